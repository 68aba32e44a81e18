"""An adapter folded into its model: what `lorax-kit merge` does.

`merge_trained` knows the model from the adapter, which remembers its task; `merge_adapter` is given it, and keeps every
tensor that its folder has.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_kit import models
from lorax_kit.algebra import MergeLoss, merge_loss
from lorax_kit.checkpoint.adapter import load_adapter, read_document
from lorax_kit.checkpoint.tensors import write_tensors
from lorax_kit.commands.adapters.exchange import Model, load_model, read_adapter, read_from
from lorax_kit.core.merge import merge
from lorax_kit.core.paths import Params, flatten
from lorax_kit.errors import AdapterError
from lorax_kit.files.staging import refuse_existing, refuse_near, staged
from lorax_kit.models.stored.families import FAMILIES
from lorax_kit.models.stored.save import cast_tensor
from lorax_kit.models.stored.weights import SINGLE, open_folder, sliced, transposed
from lorax_kit.problem.base import based, restored
from lorax_kit.problems import settings_from
from lorax_kit.problems.packaged.sentiment import adapter_folder

HEADS = {"classifier": "classify", "answer": "answer"}
"""What problems call a head -> what models call it."""
HEAD = {"classifier.weight", "classifier.bias"}
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def merge_adapter(
    source: str, out: str, base: str, *, dtype: str = "float32", overwrite: bool = False
) -> dict[str, Any]:
    """Write the model with an adapter folded in, as a Hugging Face folder; what the merge loses, as plain data.

    The folder holds model.safetensors with every tensor of the base under its own name, the adapter's changes in it,
    and what came with the base (config.json, tokenizer.json). Nothing is there that neither base nor adapter has.

    Raises:
      AdapterError: `out` is what is read, or lies within or around it, or holds other files; the adapter changes
        what the base does not have, or brings a head of another shape.
    """
    path, source = Path(out).absolute(), str(adapter_folder(source))
    refuse_near(path, read_from(base, [source]))
    refuse_existing(path, overwrite, SINGLE, "model", {SINGLE, *FILES})
    model = load_model(base, [source])
    adapter = read_adapter(source, model)
    loss = merge_loss(model.base, adapter, dtype=dtype)
    merged = flatten(merge(model.base, adapter.factors, adapter.plan))[0]
    tensors = {name: cast_tensor(name, x, dtype) for name, x in _tensors(model, adapter, merged).items()}
    with staged(path, overwrite) as new:
        new.mkdir()
        write_tensors(new / SINGLE, tensors)
        for name in FILES:
            if model.folder is not None and (model.folder / name).is_file():
                shutil.copyfile(model.folder / name, new / name)
    return _told(out, dtype, len(tensors), loss)


def merge_trained(
    source: str, out: str, *, dtype: str = "float32", head: bool = True, overwrite: bool = False
) -> dict[str, Any]:
    """Write the model of an adapter that remembers its task, with it folded in, as a Hugging Face folder.

    Args:
      head: with the head of a classifier or of answers; without, the backbone alone.

    Raises:
      AdapterError: an adapter that does not say what it was trained on, a head that no class of transformers computes,
        or `out` is what is read, lies within or around it, or exists.
    """
    path, target = adapter_folder(source), Path(out).absolute()
    document = read_document(path, typed=False)
    settings = document["meta"].get("settings")
    if document["meta"].get("address") or not isinstance(settings, dict) or "task" not in settings:
        raise AdapterError(f"the adapter at {str(path)!r} does not say which model it is of.\n  give it as --base")
    built: Any = settings_from(settings)
    loaded = models.load_model(built.model, quantise=getattr(built, "quantise", None))
    refuse_near(target, [*read_from(built.model, []), path])
    refuse_existing(target, overwrite, SINGLE, "model")
    base, name = _around(loaded, document["arrays"])
    form = document["meta"].get("base_form") or {}
    base = based(base, form.get("dtype"), form.get("quantise"), tuple(form.get("paths", ())))
    adapter = load_adapter(path, base=base)
    loss = merge_loss(base, adapter, dtype=dtype)
    merged = restored(merge(base, adapter.factors, adapter.plan))
    trained_head = merged.pop(name) if name is not None else None
    backbone = merged[loaded.kind] if name is not None and loaded.kind != "encoder-decoder" else merged
    heads: dict[str, Any] = {}
    if trained_head is not None and head:
        heads = {HEADS[str(name)]: trained_head}
        _check_head(loaded, HEADS[str(name)], trained_head)
    labels = None
    if "classify" in heads:
        labels = tuple(document["meta"].get("labels") or built.build().facts.get("labels") or ("value",))
    with staged(target, overwrite) as new:
        models.save_model(new, replace(loaded, heads=heads, labels=labels), backbone, dtype=dtype)
        count = len(open_folder(new).names)
    return _told(out, dtype, count, loss)


def _told(out: str, dtype: str, tensors: int, loss: MergeLoss) -> dict[str, Any]:
    """What was written, and what the merge loses, as plain data."""
    rows = [{"path": row.path, "error": row.ratio, "lost": row.share} for row in loss.rows]
    return {"model": out, "dtype": dtype, "tensors": tensors, "sites": rows, "table": str(loss)}


def _around(loaded: models.Loaded, arrays: dict[str, Any]) -> tuple[Params, str | None]:
    """The params of an adapter's problem, and the name of the head among them, of zeros: the adapter has it whole."""
    name = next((name for name in HEADS if any(path.startswith(f"{name}/") for path in arrays)), None)
    if name is None:
        return ({"encoder": loaded.params} if loaded.kind == "encoder" else loaded.params), None
    base: dict[str, Any] = dict(loaded.params) if loaded.kind == "encoder-decoder" else {loaded.kind: loaded.params}
    for path, array in arrays.items():
        if path.startswith(f"{name}/"):
            *parts, leaf = path.removesuffix(":value").split("/")
            inner = base
            for part in parts:
                inner = inner.setdefault(part, {})
            inner[leaf] = jnp.zeros(array["shape"], array["dtype"])
    return base, name


def _check_head(loaded: models.Loaded, name: str, head: Params) -> None:
    if set(flatten(head)[0]) != set(FAMILIES[loaded.family].heads.get(name, ())):
        of = "the last token" if loaded.kind == "decoder" else "the mean over the tokens"
        raise AdapterError(
            f"the adapter's head is a linear map of {of}, which no class of transformers for {loaded.family!r} "
            "computes.\n  --without-head writes the model below it alone"
        )


def _tensors(model: Model, adapter: Any, merged: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor of the merged model by its name: those of the base, and what the adapter makes of them."""
    stored = model.stored
    if stored is None:
        return {name: _in_torch(path, name, merged[path]) for path, name in model.own.items()}
    out = {name: np.asarray(stored.read(name)) for name in sorted(stored.names)}
    full = {leaf.path for leaf in adapter.plan.full}
    brought = set()
    for path in adapter.plan.trained:
        (name, start, end), x = sliced(model.own[path]), _in_torch(path, model.own[path], merged[path])
        if name not in out and path not in full:
            raise AdapterError(
                f"the adapter changes {path!r}, and {str(model.folder)!r} has no {name!r} to change.\n"
                "  give the model it was trained on as --base"
            )
        if name not in out:
            brought.add(name)
        elif end:
            out[name] = np.concatenate([out[name][..., :start], x, out[name][..., end:]], axis=-1)
            continue
        elif out[name].shape != x.shape:
            raise AdapterError(
                f"the adapter has a {name!r} of shape {x.shape}, {str(model.folder)!r} has one of {out[name].shape}.\n"
                "  give the model it was trained on as --base"
            )
        for other in (name, *(getattr(model.names[path], "also", None) or ())):
            if other == name or other in out:
                out[other] = x
    if brought and not out.keys() >= HEAD:
        raise AdapterError(
            f"the adapter brings {', '.join(sorted(brought))!r} alone, and {str(model.folder)!r} has no "
            f"{', '.join(sorted(HEAD - out.keys()))!r} beside it.\n  give the model it was trained on as --base"
        )
    if brought and not any(name.startswith("bert.") for name in out):  # so Hugging Face calls an encoder under a head
        inner = ("embeddings.", "encoder.", "pooler.")
        out = {f"bert.{name}" if name.startswith(inner) else name: x for name, x in out.items()}
    return out


def _in_torch(path: str, name: str, x: Any) -> np.ndarray:
    return np.asarray(x).T if transposed(path, name) else np.asarray(x)
