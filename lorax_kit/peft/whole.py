"""What a PEFT folder has of parameters trained in full: modules_to_save and biases, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kit.core.errors import AdapterError
from lorax_kit.core.lowrank import dense
from lorax_kit.core.paths import closest
from lorax_kit.core.quantised import Quantised
from lorax_kit.peft.config import Config
from lorax_kit.peft.files import CONFIG, WEIGHTS
from lorax_kit.peft.layout import from_torch
from lorax_kit.peft.modules import Reader
from lorax_kit.peft.names import Names, Place
from lorax_kit.peft.targets import check_kept, kept_whole


def full_leaves(
    config: Config,
    rest: Mapping[str, np.ndarray],
    torch: Names,
    named: Mapping[str, Any],
    reader: Reader,
    dtype: str | None,
) -> dict[str, np.ndarray]:
    """Path -> value of what was trained in full; every other tensor must be a copy of the base's.

    Raises:
      AdapterError: a tensor that is no parameter, does not fit, or is neither kept nor a copy; one that is missing; a tied
        parameter of which one use was trained.
    """
    data, form = config.data, config.form
    check_kept(data, rest, config.notes)
    values: dict[str, Any] = {}
    dtypes: dict[str, str] = {}
    covered: set[str] = set()
    copies: dict[str, tuple[str, np.ndarray]] = {}
    for key, x in rest.items():
        left = key.replace(".modules_to_save.", ".").replace(".original_module.", ".")
        if left != key and key.endswith(".bias") and left in rest and kept_whole(data, left):
            config.notes.append(f"the tensor {key!r} repeats {left!r}")
            continue
        name = key.replace(".base_layer.", ".")  # so PEFT keeps what an adapted module has besides
        path = torch.twin(name)
        if path is not None:
            copies[name] = path, x
            continue
        if name not in torch.places:
            raise AdapterError(
                f"{WEIGHTS} has the tensor {key!r}, which is no parameter of this base.\n"
                f"  closest: {closest(name, list(torch.places))}"
            )
        module, _, end = name.rpartition(".")
        own_bias = end == "bias" and data.get("bias") == form.bias and module in reader.adapted
        trained = (name == key and kept_whole(data, name)) or (end == "bias" and data.get("bias") == "all") or own_bias
        for place in torch.places[name]:
            part = from_torch(place.path, _cut(x, place, torch), place.path in torch.inputs_first)
            base = _at(place, dense(named[place.path]), torch)
            if part.shape != base.shape:
                raise AdapterError(
                    f"{WEIGHTS} has {key!r} of shape {x.shape}, which does not fit {place.path!r} {base.shape}."
                )
            if trained:
                _put(values, place, part, named, torch)
                dtypes[place.path] = str(x.dtype)
            elif not np.array_equal(part.astype(np.float32), base.astype(np.float32)):
                raise AdapterError(
                    f"{WEIGHTS} has the tensor {key!r}, which differs from the base and is not in modules_to_save.\n"
                    f"  load the base with this value at {place.path!r}"
                )
        covered.add(name)
    for name in torch.places:
        if kept_whole(data, name) and name not in covered:
            raise AdapterError(f"{WEIGHTS} has no tensor {name!r}, which {CONFIG} keeps by modules_to_save.")
    for name in torch.places:
        module, _, end = name.rpartition(".")
        own = data.get("bias") == form.bias is not None and module in reader.adapted
        if end == "bias" and name not in covered and (own or data.get("bias") == "all"):
            raise AdapterError(f"{WEIGHTS} has no tensor {name!r}, which {CONFIG} trains by bias {data['bias']!r}.")
    for name, (gain, shift) in reader.biases.items():
        for place in torch.places.get(name, ()):
            rows = slice(*place.outputs) if place.outputs else slice(None)
            held_now = values.get(place.path, dense(named[place.path]))
            base = _at(place, np.asarray(held_now, np.float64), torch)
            moved = base * (1 if gain is None else gain[rows]) + (0 if shift is None else shift[rows])
            _put(values, place, moved, named, torch)
            dtypes.setdefault(place.path, "float32")
    _check_copies(config, torch, values, copies, named, reader)
    out = {}
    for path, value in values.items():
        if isinstance(named[path], Quantised):
            raise AdapterError(f"{path!r} is quantised here, and trained in full there.\n  load it over whole params")
        with jax.numpy_dtype_promotion("standard"):
            held = jnp.promote_types(named[path].dtype, dtype or dtypes[path])
        out[path] = value.astype(held)
    return out


def _check_copies(
    config: Config,
    torch: Names,
    values: Mapping[str, Any],
    copies: Mapping[str, tuple[str, np.ndarray]],
    named: Mapping[str, Any],
    reader: Reader,
) -> None:
    """One parameter that serves two modules must have been trained as one."""
    for name, (path, x) in copies.items():
        mine = values[path] if path in values else np.asarray(dense(named[path]))
        theirs = from_torch(path, x, path in torch.inputs_first)
        if theirs.shape != mine.shape or not np.array_equal(mine.astype(np.float32), theirs.astype(np.float32)):
            raise AdapterError(
                f"{WEIGHTS} has a {name!r} of its own, and here it is one parameter with {path!r}.\n"
                "  load it over params whose head is apart"
            )
    for path in values:
        if np.ndim(named[path]) != 2 or config.data.get("ensure_weight_tying"):
            continue
        site = reader.sites.get(path)
        others = torch.tied(path, None if site is None else site.use)
        if others and not set(others) <= set(copies):
            raise AdapterError(
                f"PEFT trained {torch.templates[path]!r} alone, and here one parameter, {path!r}, is also {others[0]!r}.\n"
                "  load it over params whose head is apart, or train it with ensure_weight_tying=True"
            )


def _cut(x: np.ndarray, place: Place, torch: Names) -> np.ndarray:
    """The part of a fused tensor that a place holds."""
    if place.outputs is None:
        return x
    rows = slice(*place.outputs)
    return x[..., rows] if place.path in torch.inputs_first else x[rows]


def _at(place: Place, x: Any, torch: Names) -> np.ndarray:
    """One matrix or vector of a stacked parameter."""
    x = np.asarray(x)
    return np.moveaxis(x, torch.stack[place.path], range(len(place.index)))[place.index]


def _put(values: dict[str, Any], place: Place, part: np.ndarray, named: Mapping[str, Any], torch: Names) -> None:
    stack = torch.stack[place.path]
    if not stack:
        values[place.path] = part
        return
    whole = values.setdefault(place.path, np.array(dense(named[place.path]), np.float32))
    np.moveaxis(whole, stack, range(len(stack)))[place.index] = part
