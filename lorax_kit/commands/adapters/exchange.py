"""Adapters between formats, methods and models: what `lorax-kit convert` and `combine` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kit.algebra import combine, to_lora
from lorax_kit.algebra.combine import SUMS
from lorax_kit.checkpoint import load_adapter, save_adapter
from lorax_kit.checkpoint.adapter import adapter_bytes, read_document
from lorax_kit.checkpoint.tensors import read_tensors
from lorax_kit.core.paths import Params
from lorax_kit.errors import AdapterError
from lorax_kit.files.staging import refuse_near
from lorax_kit.models import (
    classifier_names,
    classifier_params,
    llama_names,
    load_bert,
    load_llama,
    locate,
    torch_names,
)
from lorax_kit.models.stored.families import FAMILIES
from lorax_kit.models.stored.load import PACKAGED, read_backbone
from lorax_kit.models.stored.weights import Stored, open_folder, read_config
from lorax_kit.peft import load_peft, save_peft
from lorax_kit.problems.packaged.sentiment import adapter_folder

FORMATS = ("orbax", "peft")
WEIGHTS = "adapter_model.safetensors"


class Model(NamedTuple):
    """A model whose adapters are read and written.

    Attributes:
      base: its params.
      names: path of a parameter -> its name in torch, as adapters call it.
      own: path -> the name that the model's own files have for it, or for the tensor that it is a part of.
      folder: of the files that came with it, or None (a GGUF file).
      stored: the tensors of that folder, or None.
      drawn: paths of parameters that the files do not have, whose values here are no model's.
    """

    base: Params
    names: dict[str, Any]
    own: Mapping[str, str]
    folder: Path | None
    stored: Stored | None
    drawn: frozenset[str] = frozenset()


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
    """The model that adapters belong to: its backbone, or of a BERT a classifier around it.

    Args:
      source: as in `lorax-kit inspect` and `compress`: minilm or smollm2, a Hugging Face folder, a GGUF file.
      adapters: folders; where one of them knows BERT's classifier, the model is one, with the head of the folder. A
        folder without a head of as many classes lends a random one, in whose place an adapter is to bring its own.
    """
    folder = Path(source) if source not in PACKAGED else locate(*PACKAGED[source])
    if folder.suffix == ".gguf":
        decoder = load_llama(folder)
        names = llama_names(decoder.config)
        return Model(decoder.params, names, names, None, None)
    data = read_config(folder)
    if isinstance(data, dict) and data.get("model_type", "bert") != "bert":
        backbone = read_backbone(folder, data, FAMILIES)
        names = backbone.family.names_under(backbone.family.classes["backbone"].prefix, backbone.data)
        return Model(backbone.params, {p: names[p] for p in backbone.names}, backbone.names, folder, backbone.stored)
    encoder = load_bert(source)
    stored, names = open_folder(folder), torch_names(encoder.config)
    prefix = "bert." if any(name.startswith("bert.") for name in stored.names) else ""
    stored_names = {p: prefix + name for p, name in names.items()}
    known = [_head_of(adapter) for adapter in adapters]
    classes = {n for n, _ in known if n is not None}
    if len(classes) > 1:
        raise AdapterError(
            f"the adapters have heads of {', '.join(map(str, sorted(classes)))} classes: one model has one."
        )
    head = _stored_head(stored, encoder.config.hidden_size)
    if not any(inside for _, inside in known):
        return Model(encoder.params, names, stored_names, folder, stored)
    if not classes and head is None:
        return Model(encoder.params, {p: f"bert.{name}" for p, name in names.items()}, stored_names, folder, stored)
    count = classes.pop() if classes else len(head["bias"])  # type: ignore[index]
    params, drawn = classifier_params(encoder, count, jax.random.key(0)), frozenset[str]()
    if head is not None and len(head["bias"]) == count:
        params["classifier"] = head
    else:
        drawn = frozenset(f"classifier/{leaf}" for leaf in params["classifier"])
    names = classifier_names(encoder.config)
    stored_names = {p: stored_names.get(p.removeprefix("encoder/"), str(name)) for p, name in names.items()}
    return Model(params, names, stored_names, folder, stored, drawn)


def read_from(source: str, adapters: Sequence[str | Path]) -> list[Path]:
    """The files and folders that a command reads, in whose place nothing may be written."""
    base = PACKAGED.get(source)
    return [Path(source) if base is None else locate(*base), *map(Path, adapters)]


def _stored_head(stored: Stored, width: int) -> dict[str, Any] | None:
    """The linear classifier among the tensors of a folder, as params."""
    if not {"classifier.weight", "classifier.bias"} <= set(stored.names):
        return None
    weight, bias = (np.asarray(stored.read(f"classifier.{x}")) for x in ("weight", "bias"))
    if bias.ndim != 1 or weight.shape != (len(bias), width):
        return None
    return {"kernel": jnp.asarray(weight.T, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}


def _head_of(adapter: str | Path) -> tuple[int | None, bool]:
    """How many classes the head of an adapter's model has, if it says, and whether its encoder lies in a classifier."""
    folder = Path(adapter)
    if format_of(folder) == "orbax":
        document = read_document(folder, typed=False)
        leaves = document.get("leaves") or {}
        if head := document["arrays"].get("classifier/bias:value"):
            return int(head["shape"][0]), True
        if "classifier/bias" in leaves:
            return int(leaves["classifier/bias"][1][0]), True
        inside = any(name.startswith("encoder/") for name in document["arrays"])
        return (2 if inside and not leaves else None), inside
    tensors = read_tensors(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else {}
    for name, x in tensors.items():
        if name.endswith(".classifier.bias") and x.ndim == 1:
            return len(x), True
    return None, any(".bert." in name for name in tensors)


def read_adapter(folder: str | Path, model: Model, form: str | None = None) -> Any:
    """An adapter of a model, of either format.

    Raises:
      AdapterError: of a task whose head no class of transformers or PEFT computes.
    """
    if (form or format_of(folder)) == "peft":
        return load_peft(folder, base=model.base, names=model.names)
    document = read_document(folder, typed=False)
    if any(path.startswith(("classifier/output/", "answer/output/")) for path in document["arrays"]):
        task = document["meta"].get("problem")
        raise AdapterError(
            f"the adapter at {str(folder)!r} has a head of the task {task!r}, which no class of PEFT computes."
            "\n  lorax-kit merge --without-head writes its model; lorax-kit export its model and head"
        )
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
    source = source[0], str(adapter_folder(source[1]))
    if format_of(source[1]) != source[0]:
        raise AdapterError(f"{source[1]!r} is an adapter of {format_of(source[1])}, not of {source[0]}.")
    refuse_near(Path(target[1]).absolute(), read_from(base, [source[1]]))
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
    seed: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Combine adapters of one base into one LoRA, as `lk.algebra.combine`; what was written, as plain data.

    Raises:
      AdapterError: as `combine`; heads that began at values which the base does not have, and no mean of them is asked.
    """
    sources = [str(adapter_folder(source)) for source in sources]
    refuse_near(Path(out).absolute(), read_from(base, sources))
    model = load_model(base, sources)
    adapters = [read_adapter(folder, model) for folder in sources]
    trained = sorted(model.drawn & {leaf.path for adapter in adapters for leaf in adapter.plan.full})
    mean = how in SUMS and abs(sum(weights or [1.0] * len(adapters)) - 1) < 1e-6
    if trained and not mean:  # of a mean the base's value drops out
        raise AdapterError(
            f"{trained[0]!r} is trained in full, and {base!r} does not have it: where each adapter began is not known, "
            "and so not what it changed.\n"
            f"  combine by {', '.join(SUMS)} with weights that sum to 1: a mean of the heads"
        )
    draws = how.startswith("dare")
    if seed is not None and not draws:
        raise AdapterError(f"a seed is for the ways that draw, dare_linear and dare_ties; {how!r} does not.")
    key = jax.random.key(seed or 0) if draws else None
    made = combine(adapters, how, weights=weights, rank=rank, energy=energy, density=density, key=key, base=model.base)
    meta = {"combined": list(map(str, sources)), "how": how, "weights": None if weights is None else list(weights)}
    save_adapter(out, made.plan, made.factors, base=model.base, meta=meta, overwrite=overwrite)
    sites = [{"path": s.path, "rank": s.rank, "error": made.errors.get(s.path, 0.0)} for s in made.plan.sites]
    return {"adapter": out, "how": how, "sites": sites, "bytes": adapter_bytes(out)}
