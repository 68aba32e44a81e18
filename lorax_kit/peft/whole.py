"""What a PEFT folder has of parameters trained in full: modules_to_save and biases, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kit.core.leaves import FactorTree
from lorax_kit.core.lowrank import dense
from lorax_kit.core.paths import closest
from lorax_kit.core.plan import Plan
from lorax_kit.core.quantised import Quantised
from lorax_kit.errors import AdapterError
from lorax_kit.peft.folder.config import Config, check_kept, kept_whole, moves_ties
from lorax_kit.peft.folder.files import CONFIG, WEIGHTS
from lorax_kit.peft.layout import from_torch, in_torch
from lorax_kit.peft.modules import Reader
from lorax_kit.peft.names import Names, Place
from lorax_kit.peft.write import Written


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
      AdapterError: a tensor that is no parameter, does not fit, or is neither kept nor a copy; one that is missing; a
        tied parameter of which one use was trained.
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
    _check_complete(config, torch, covered, reader)
    _move_biases(values, dtypes, torch, named, reader)
    _check_copies(config, torch, values, copies, named, reader)
    out = {}
    for path, value in values.items():
        if isinstance(named[path], Quantised):
            raise AdapterError(f"{path!r} is quantised here, and trained in full there.\n  load it over whole params")
        with jax.numpy_dtype_promotion("standard"):
            held = jnp.promote_types(named[path].dtype, dtype or dtypes[path])
        out[path] = value.astype(held)
    return out


def _check_complete(config: Config, torch: Names, covered: set[str], reader: Reader) -> None:
    """Raise `AdapterError` where a tensor is missing that the config says was trained."""
    data, form = config.data, config.form
    for name in torch.places:
        if kept_whole(data, name) and name not in covered:
            raise AdapterError(f"{WEIGHTS} has no tensor {name!r}, which {CONFIG} keeps by modules_to_save.")
    for name in torch.places:
        module, _, end = name.rpartition(".")
        own = data.get("bias") == form.bias is not None and module in reader.adapted
        if end == "bias" and name not in covered and (own or data.get("bias") == "all"):
            raise AdapterError(f"{WEIGHTS} has no tensor {name!r}, which {CONFIG} trains by bias {data['bias']!r}.")


def _move_biases(
    values: dict[str, Any], dtypes: dict[str, str], torch: Names, named: Mapping[str, Any], reader: Reader
) -> None:
    """Put what a method does to biases into the values of what was trained in full."""
    for name, (gain, shift) in reader.biases.items():
        for place in torch.places.get(name, ()):
            rows = slice(*place.outputs) if place.outputs else slice(None)
            held_now = values.get(place.path, dense(named[place.path]))
            base = _at(place, np.asarray(held_now, np.float64), torch)
            moved = base * (1 if gain is None else gain[rows]) + (0 if shift is None else shift[rows])
            _put(values, place, moved, named, torch)
            dtypes.setdefault(place.path, "float32")


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
        if np.ndim(named[path]) != 2 or moves_ties(config.data):
            continue
        site = reader.sites.get(path)
        others = torch.tied(path, None if site is None else site.use)
        if others and not set(others) <= set(copies):
            raise AdapterError(
                f"PEFT trained {torch.templates[path]!r} alone, and here {path!r} is also {others[0]!r}.\n"
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
    return np.moveaxis(x, torch.stack[place.path], range(len(place.at)))[place.at]


def _put(values: dict[str, Any], place: Place, part: np.ndarray, named: Mapping[str, Any], torch: Names) -> None:
    stack = torch.stack[place.path]
    if not stack:
        values[place.path] = part
        return
    whole = values.setdefault(place.path, np.array(dense(named[place.path]), np.float32))
    np.moveaxis(whole, stack, range(len(stack)))[place.at] = part


@dataclass
class Kept:
    """What is kept.

    Attributes:
      tensors: by their names in torch.
      modules: for modules_to_save.
      bias: of the config; None: the method has none.
      heads: modules that are tied to one of them.
    """

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    bias: str | None = "none"
    heads: set[str] = field(default_factory=set)


def kept(
    plan: Plan, factors: FactorTree, torch: Names, named: Mapping[str, Any], modules: Mapping[str, Written]
) -> Kept:
    """Parameters trained in full.

    Raises:
      AdapterError: a module both adapted and trained in full, or one that PEFT would confuse with another.
    """
    full = {leaf.path for leaf in plan.full}
    trained = [name for name, places in torch.places.items() if any(p.path in full for p in places)]
    out = Kept()
    adapted = {m.module.name: m for m in modules.values()}
    form = next((m.form for m in modules.values() if m.beside is None), next(iter(modules.values())).form)
    _check_moved_biases(modules, torch, named, factors, full)
    moved = {f"{name}.bias" for name, m in adapted.items() if "bias_gain" in m.leaves}
    biases = [name for name in torch.places if name.endswith(".bias")]
    trained_biases = [
        name for name in biases if name.rpartition(".")[0] in adapted and name in trained and name not in moved
    ]
    if form.bias is None:
        out.bias = None
    if trained_biases and form.bias is not None:
        out.bias = "all" if set(biases) <= set(trained) else form.bias
        for name in biases if out.bias == "all" else trained_biases:
            module, _, _ = name.rpartition(".")
            inner = ".base_layer" if module in adapted else ""
            out.tensors[f"{module}{inner}.bias"] = _value(name, torch, named, factors)
    done = set(biases) if out.bias == "all" else set(trained_biases) if out.bias not in (None, "none") else set()
    for name in trained:
        module = name.rpartition(".")[0]
        if name in done or name in moved:
            continue
        if module in adapted:
            raise AdapterError(
                f"{module!r} is adapted and also has a parameter trained in full: PEFT does one or the other.\n"
                "  use lk.save_adapter, or leave one out"
            )
        out.modules.add(module)
    owners = {name: name.rpartition(".")[0] for name in torch.places}
    for module in out.modules:
        for other in sorted({*owners.values(), *adapted} - {module}):
            if other.endswith(module):
                raise AdapterError(
                    f"PEFT's modules_to_save takes {module!r} for the end of {other!r}, and trains both."
                )
    for name, owner in owners.items():
        if owner in out.modules:
            value = out.tensors[name] = _value(name, torch, named, factors)
            for place in torch.places[name]:
                others = torch.tied(place.path, "lookup") if torch.also[place.path] else ()
                others = others or _guess_ties(place.path, torch, value)
                for other in others:  # PEFT looks for ties only where a head is named
                    out.tensors[other] = value
                    out.heads.add(other.rpartition(".")[0])
    return out


def _guess_ties(path: str, torch: Names, value: np.ndarray) -> tuple[str, ...]:
    """As for sites: an error where nothing tells whether an embedding is tied."""
    return torch.tied(path, None) if value.ndim == 2 and torch.also[path] is None else ()


def _value(name: str, torch: Names, named: Mapping[str, Any], factors: FactorTree) -> np.ndarray:
    """A torch parameter as trained, or as it stands in the base."""
    parts = []
    for place in torch.places[name]:
        x = getattr(factors.get(place.path), "value", None)
        x = np.asarray(dense(named[place.path]) if x is None else x)
        x = np.moveaxis(x, torch.stack[place.path], range(len(place.at)))[place.at]
        parts.append(in_torch(place.path, x, place.path in torch.inputs_first))
    first = torch.places[name][0].path in torch.inputs_first
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1 if first else 0)


def _check_moved_biases(
    modules: Mapping[str, Written], torch: Names, named: Mapping[str, Any], factors: FactorTree, full: set[str]
) -> None:
    """Where PEFT's module also multiplies its bias, ours must be that already."""
    for name, m in modules.items():
        gain = m.form.bias_gain(m.module, m.setting, m.leaves) if m.form.bias_gain is not None else None
        places = torch.places.get(f"{name}.bias")
        if gain is None or places is None:
            continue
        base = np.concatenate([np.asarray(dense(named[p.path]), np.float64)[p.at].reshape(-1) for p in places])
        here = np.asarray(_value(f"{name}.bias", torch, named, factors), np.float64)
        if not np.allclose(here, base * gain, rtol=1e-6, atol=1e-30):
            raise AdapterError(
                f"PEFT multiplies the bias of {name!r} by its gain, and here {places[0].path!r} stays apart.\n"
                "  let its value be gain * bias (Full), adapt inputs instead (feedforward), or use lk.save_adapter"
            )
        m.leaves["bias_gain"] = gain
