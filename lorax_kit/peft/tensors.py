"""The tensors of a PEFT folder, sorted by what they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from lorax_kit.core.errors import AdapterError
from lorax_kit.peft.config import Config

ROOT, PREFIX = "base_model.", "base_model.model."


@dataclass
class Sorted:
    """Tensors by what they are.

    Attributes:
      modules: module -> end of the name -> tensor, of the main method.
      beside: key of the config -> module -> end of the name -> tensor (trainable tokens).
      shared: of the whole adapter, by name.
      rest: by their names in the torch model: what was trained in full, and copies of the base.
    """

    modules: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    beside: dict[str, dict[str, dict[str, np.ndarray]]] = field(default_factory=dict)
    shared: dict[str, np.ndarray] = field(default_factory=dict)
    rest: dict[str, np.ndarray] = field(default_factory=dict)


def sort_out(tensors: Mapping[str, np.ndarray], config: Config) -> Sorted:
    """Sort tensors by the ends of their names.

    Raises:
      AdapterError: a name without PEFT's prefix, or a tensor that comes under two names.
    """
    out, form = Sorted(), config.form
    ends = {**{e: e for e in form.endings}, **form.older}
    beside = {}
    for key, method in config.beside.items():
        assert method.peft is not None
        beside[key] = (method.peft.beside[form.peft_type][0], method.peft.endings[0])
    for full, x in tensors.items():
        if full.startswith(ROOT) and "." not in full.removeprefix(ROOT):
            out.shared[full.removeprefix(ROOT)] = x
            continue
        if not full.startswith(PREFIX):
            raise AdapterError(f"the tensor {full!r} is not PEFT's: its names start with {PREFIX!r}.")
        name = full.removeprefix(PREFIX)
        held, end = out.modules, _end_of(name, ends)
        for key, (long, short) in beside.items():
            if name.endswith(f".{long}"):
                held, end, ends_here = out.beside.setdefault(key, {}), long, {long: short}
                break
        else:
            ends_here = ends
        if end is None:
            _refuse_named_adapter(full, ends)
            out.rest[name] = x
            continue
        found = held.setdefault(name.removesuffix(f".{end}"), {})
        if ends_here[end] in found:
            raise AdapterError(f"the tensor {full!r} comes twice, under an older name too.")
        found[ends_here[end]] = x
    return out


def _end_of(name: str, ends: Iterable[str]) -> str | None:
    return max((e for e in ends if name.endswith(f".{e}")), key=len, default=None)


def _refuse_named_adapter(full: str, ends: Iterable[str]) -> None:
    """Raise `AdapterError` for a tensor of a model in memory, whose name holds the adapter's behind the factor's."""
    factors = "|".join(sorted({re.escape(e.removesuffix(".weight")) for e in ends}, key=len, reverse=True))
    own = re.search(rf"\.({factors})\.(?!weight$)(.+?)(\.weight)?$", full)
    if own:
        raise AdapterError(
            f"the tensor {full!r} names its adapter, {own[2]!r}, which the files of save_pretrained leave out.\n"
            f"  rename it: {full.replace(f'.{own[1]}.{own[2]}', f'.{own[1]}')!r}, or write it by save_pretrained"
        )
