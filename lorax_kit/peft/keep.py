"""What an adapter trains in full, as PEFT keeps it: biases of its own, and whole modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorax_kit.core.errors import AdapterError
from lorax_kit.core.leaves import FactorTree
from lorax_kit.core.lowrank import dense
from lorax_kit.core.plan import Plan
from lorax_kit.peft.layout import in_torch
from lorax_kit.peft.names import Names
from lorax_kit.peft.write import Written


@dataclass
class Kept:
    """Attributes: `tensors` by their names in torch, `modules` for modules_to_save, `bias`, and whether a tied one is in."""

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    bias: str | None = "none"
    tied: bool = False


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
    own = [name for name in biases if name.rpartition(".")[0] in adapted and name in trained and name not in moved]
    if form.bias is None:
        out.bias = None
    if own and form.bias is not None:
        out.bias = "all" if set(biases) <= set(trained) else form.bias
        for name in biases if out.bias == "all" else own:
            module, _, _ = name.rpartition(".")
            inner = ".base_layer" if module in adapted else ""
            out.tensors[f"{module}{inner}.bias"] = _value(name, torch, named, factors)
    done = set(biases) if out.bias == "all" else set(own) if out.bias not in (None, "none") else set()
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
                for other in others:
                    out.tensors[other] = value
                    out.tied = True
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
        x = np.moveaxis(x, torch.stack[place.path], range(len(place.index)))[place.index]
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
        base = np.concatenate([np.asarray(dense(named[p.path]), np.float64)[p.index].reshape(-1) for p in places])
        here = np.asarray(_value(f"{name}.bias", torch, named, factors), np.float64)
        if not np.allclose(here, base * gain, rtol=1e-6, atol=1e-30):
            raise AdapterError(
                f"PEFT multiplies the bias of {name!r} by its gain, and here {places[0].path!r} is a parameter of its own.\n"
                "  train its bias in full as gain * bias, adapt inputs instead (feedforward), or use lk.save_adapter"
            )
        m.leaves["bias_gain"] = gain
