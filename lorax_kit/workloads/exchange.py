"""Adapters between formats, methods and models: what `lorax-kit convert`, `combine` and `merge` do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax_kit.algebra import combine, merge_loss, to_lora
from lorax_kit.checkpoint import load_adapter, save_adapter
from lorax_kit.checkpoint.adapter import adapter_bytes, read_document
from lorax_kit.checkpoint.staging import refuse_existing, staged
from lorax_kit.checkpoint.tensors import read_tensors, write_tensors
from lorax_kit.core.merge import merge
from lorax_kit.core.paths import Params, flatten
from lorax_kit.errors import AdapterError
from lorax_kit.models import (
    classifier_names,
    classifier_params,
    llama_names,
    load_bert,
    load_llama,
    locate,
    torch_names,
)
from lorax_kit.models.pretrained import MINILM
from lorax_kit.peft import load_peft, save_peft

FORMATS = ("orbax", "peft")
WEIGHTS = "adapter_model.safetensors"


class Model(NamedTuple):
    """A model whose adapters are read and written.

    Attributes:
      base: its params.
      names: path of a parameter -> its name in torch.
      folder: of the files that came with it, or None (a GGUF file).
    """

    base: Params
    names: dict[str, Any]
    folder: Path | None


def format_of(folder: str | Path) -> str:
    """Whether a folder is an adapter of ours ("orbax") or of PEFT ("peft").

    Raises:
      AdapterError: it is neither.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        return "peft"
    if (folder / "spec").is_dir():
        return "orbax"
    raise AdapterError(
        f"{str(folder)!r} is no adapter: it has neither a 'spec' of ours nor PEFT's adapter_config.json."
    )


def load_model(source: str, adapters: Sequence[str | Path]) -> Model:
    """The model that adapters belong to: an encoder alone, a classifier around it, or a decoder.

    Args:
      source: as in `lorax-kit inspect` and `compress`: minilm or smollm2, a Hugging Face folder, a GGUF file.
      adapters: folders; where one of them knows a classifier, the model is one, with a head of zeros.
    """
    path = Path(source)
    kind = (
        json.loads((path / "config.json").read_text()).get("model_type") if (path / "config.json").is_file() else None
    )
    if source == "smollm2" or path.suffix == ".gguf" or kind == "llama":
        decoder = load_llama(source)
        return Model(decoder.params, llama_names(decoder.config), path if path.is_dir() else None)
    encoder = load_bert(source)
    folder = locate(*MINILM) if source == "minilm" else path
    classes = {n for adapter in adapters if (n := _classes(adapter)) is not None}
    if not classes:
        return Model(encoder.params, torch_names(encoder.config), folder)
    if len(classes) > 1:
        raise AdapterError(
            f"the adapters have heads of {', '.join(map(str, sorted(classes)))} classes: one model has one."
        )
    params = classifier_params(encoder, classes.pop(), jax.random.key(0))
    return Model(params, classifier_names(encoder.config), folder)


def _classes(adapter: str | Path) -> int | None:
    """How many classes the head of an adapter's model has; None for an adapter of an encoder alone."""
    folder = Path(adapter)
    if format_of(folder) == "orbax":
        document = read_document(folder)
        head = document["arrays"].get("classifier/bias:value")
        inside = any(name.startswith("encoder/") for name in document["arrays"])
        return int(head["shape"][0]) if head else 2 if inside else None
    tensors = read_tensors(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else {}
    for name, x in tensors.items():
        if name.endswith("classifier.bias"):
            return int(x.shape[0])
    return 2 if any(".bert." in name for name in tensors) else None


def read_adapter(folder: str | Path, model: Model, form: str | None = None) -> Any:
    """An adapter of a model, of either format."""
    if (form or format_of(folder)) == "peft":
        return load_peft(folder, base=model.base, names=model.names)
    return load_adapter(folder, base=model.base)


def convert_adapter(
    source: tuple[str, str],
    target: tuple[str, str],
    base: str,
    *,
    lora: bool = False,
    rank: int | None = None,
    energy: float | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an adapter in another format, or as plain LoRA; what was written, as plain data.

    Args:
      source, target: (format, folder), the format "orbax" or "peft".
      base: the model, as `load_model` takes it.
      lora: turn another method into plain LoRA.
      rank, energy: of that, as in `lk.algebra.to_lora`.
      base_model, task_type: for PEFT's config.
      overwrite: replace an existing adapter.
    """
    if (rank is not None or energy is not None) and not lora:
        raise AdapterError("a rank or an energy is for the plain LoRA of --lora.")
    if format_of(source[1]) != source[0]:
        raise AdapterError(f"{source[1]!r} is an adapter of {format_of(source[1])}, not of {source[0]}.")
    model = load_model(base, [source[1]])
    adapter = read_adapter(source[1], model, source[0])
    meta, errors = getattr(adapter, "meta", {}), {}
    if lora:
        adapter = to_lora(adapter, model.base, rank=rank, energy=energy)
        errors = dict(adapter.errors)
    _write(adapter, target, model, meta, base_model, task_type, overwrite)
    return {
        "adapter": target[1],
        "format": target[0],
        "sites": [{"path": s.path, "method": s.setting.kind, "rank": s.rank} for s in adapter.plan.sites],
        "full": [leaf.path for leaf in adapter.plan.full],
        "errors": errors,
        "notes": list(meta.get("notes", [])) if source[0] == "peft" else [],
        "bytes": adapter_bytes(target[1]),
    }


def _write(
    adapter: Any,
    target: tuple[str, str],
    model: Model,
    meta: dict[str, Any],
    base_model: str | None,
    task_type: str | None,
    overwrite: bool,
) -> None:
    form, folder = target
    if form == "peft":
        options: dict[str, Any] = {"base_model": base_model, "task_type": task_type, "overwrite": overwrite}
        save_peft(folder, adapter.plan, adapter.factors, base=model.base, names=model.names, **options)
    elif base_model is not None or task_type is not None:
        raise AdapterError("--base-model and --task-type stand in PEFT's config; the target is orbax.")
    else:
        save_adapter(folder, adapter.plan, adapter.factors, base=model.base, meta=meta, overwrite=overwrite)


def combine_adapters(
    sources: Sequence[str],
    out: str,
    base: str,
    *,
    how: str = "svd",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Combine adapters of one base into one LoRA, as `lk.algebra.combine`; what was written, as plain data."""
    model = load_model(base, sources)
    adapters = [read_adapter(folder, model) for folder in sources]
    key = jax.random.key(seed) if how.startswith("dare") else None
    made = combine(adapters, how, weights=weights, rank=rank, energy=energy, density=density, key=key, base=model.base)
    meta = {"combined": list(map(str, sources)), "how": how, "weights": None if weights is None else list(weights)}
    save_adapter(out, made.plan, made.factors, base=model.base, meta=meta, overwrite=overwrite)
    sites = [{"path": s.path, "rank": s.rank, "error": made.errors.get(s.path, 0.0)} for s in made.plan.sites]
    return {"adapter": out, "how": how, "sites": sites, "bytes": adapter_bytes(out)}


def merge_adapter(
    source: str, out: str, base: str, *, dtype: str = "float32", overwrite: bool = False
) -> dict[str, Any]:
    """Write the model with an adapter folded in, as a Hugging Face folder; what the merge loses, as plain data.

    The folder holds model.safetensors with the torch names and layout, and what came with the base (config.json,
    tokenizer.json).
    """
    model = load_model(base, [source])
    path = Path(out).absolute()
    refuse_existing(path, overwrite, "model.safetensors", "model")
    adapter = read_adapter(source, model)
    loss = merge_loss(model.base, adapter, dtype=dtype)
    merged = flatten(merge(model.base, adapter.factors, adapter.plan))[0]
    tensors = {}
    for name, x in merged.items():
        value = np.asarray(x).astype(np.dtype(dtype) if dtype != "bfloat16" else jax.numpy.bfloat16)
        tensors[str(model.names[name])] = value.T if name.endswith("/kernel") else value
    with staged(path, overwrite) as new:
        new.mkdir()
        write_tensors(new / "model.safetensors", tensors)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
            if model.folder is not None and (model.folder / name).is_file():
                shutil.copyfile(model.folder / name, new / name)
    rows = [{"path": row.path, "error": row.ratio, "lost": row.share} for row in loss.rows]
    return {"model": out, "dtype": dtype, "tensors": len(tensors), "sites": rows, "table": str(loss)}
