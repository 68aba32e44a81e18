"""`names`, the map from our parameters to those of a torch model: one to one, one to many layers, many to one.

A value is the torch parameter's name, and may say more:

    "encoder.layer.{}.output.dense.weight"     a {} for each leading stacked axis: scanned layers, one module per index
    "attn.c_attn.weight[768:1536]"             outputs 768 to 1535 of a fused parameter, which several of ours share
    ("embed_tokens.weight", "lm_head.weight")  a tied embedding: one parameter of ours, two modules of torch
    ("embed_tokens.weight",)                   an embedding that is known not to be tied
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

from lorax_kit.core.paths import TorchName, closest
from lorax_kit.core.plan import Plan
from lorax_kit.errors import AdapterError

_SLICE = re.compile(r"(.*)\[(\d{1,9}):(\d{1,9})\]")
_NAME = re.compile(r"[^\s/\\{}\[\]]+")
_TABLES = ("embed_tokens", "wte", "shared", "embed_in")
"""What language models call an embedding that their head is often tied to."""


class Place(NamedTuple):
    """Where a torch parameter is kept.

    Attributes:
      path: of our parameter.
      at: indices along its stacked axes.
      outputs: (first, last + 1) of the torch parameter's outputs; None: all of them.
    """

    path: str
    at: tuple[int, ...]
    outputs: tuple[int, int] | None


class Names:
    """The map, taken apart.

    Attributes:
      places: torch name -> where it is, in the order of its outputs.
      templates: path -> torch name, `{}` and all.
      stack: path -> its stacked axes.
      also: path -> further torch names of the same array; None: not known.
      inputs_first: paths of matrices that torch stores (in, out).
    """

    def __init__(self, names: Mapping[str, Any], named: Mapping[str, Any], plan: Plan | None = None) -> None:
        self.places: dict[str, list[Place]] = {}
        self.templates: dict[str, str] = {}
        self.stack: dict[str, tuple[int, ...]] = {}
        self.also: dict[str, tuple[str, ...] | None] = {}
        self.inputs_first: set[str] = set()
        axes = {} if plan is None else {site.path: site.axes for site in plan.sites}
        if not isinstance(names, Mapping):
            raise AdapterError(f"`names` is a {type(names).__name__}; it must map paths of params to names in torch.")
        for path, value in names.items():
            given = [value] if isinstance(value, str) else value
            if not isinstance(given, list | tuple) or not given or not all(isinstance(x, str) for x in given):
                raise AdapterError(
                    f"`names` gives {path!r} {value!r}; it must be a name in torch, or a tuple of names."
                )
            first, *others = given
            match = _SLICE.fullmatch(first)
            template = match[1] if match else str(first)
            outputs = (int(match[2]), int(match[3])) if match else None
            holes = template.count("{}")
            for name in (template.replace("{}", "0"), *others):
                if not _NAME.fullmatch(name) or "" in name.split("."):
                    raise AdapterError(
                        f"`names` gives {path!r} the name {name!r}, which no parameter of torch can have."
                    )
            if match and (holes or int(match[2]) >= int(match[3])):
                raise AdapterError(f"`names` gives {path!r} {value!r}: a range of outputs is [first:last + 1].")
            self.templates[path] = template
            self.also[path] = tuple(others) if not isinstance(value, str) else getattr(value, "also", None)
            if getattr(first, "inputs_first", False):
                self.inputs_first.add(path)
            shape = named[path].shape if path in named else ()
            stack = axes[path].stack if holes and path in axes else tuple(range(holes))
            if path not in named:
                continue
            if len(stack) != holes or len(shape) < holes:
                raise AdapterError(f"`names` gives {path!r} {template!r}: {holes} stacked axes, of shape {shape}.")
            self.stack[path] = stack
            for index in product(*(range(shape[i]) for i in stack)):
                place = Place(path, index, outputs)
                self.places.setdefault(template.replace("{}", "%d") % index if holes else template, []).append(place)
        if named and names and not self.stack:
            first = next(iter(names))
            raise AdapterError(
                f"none of the {len(names)} paths in `names` is a parameter of this base, {first!r} for one.\n"
                f"  closest: {closest(first, list(named))}"
            )
        for name, held in self.places.items():
            held.sort(key=lambda place: place.outputs or (0, 0))
            ends = [place.outputs for place in held]
            whole = len(held) == 1 and ends[0] is None
            if not whole and (None in ends or [0, *(b for _, b in ends[:-1])] != [a for a, _ in ends]):  # type: ignore[misc]
                paths = ", ".join(repr(place.path) for place in held[:3])
                raise AdapterError(
                    f"`names` gives {name!r} to several parameters, or not all of its outputs: {paths}.\n"
                    "  parts of a fused one are 'name[0:64]', 'name[64:128]', ..., without a gap"
                )

    @property
    def modules(self) -> set[str]:
        """Names of the modules whose weight is a parameter of the base."""
        weights = (name for name in self.places if name.endswith(".weight"))
        return {name.removesuffix(".weight") for name in weights} | {
            other.removesuffix(".weight") for p in self.also.values() for other in p or () if other.endswith(".weight")
        }

    def twin(self, name: str) -> str | None:
        """The path whose array the torch model also has under this name."""
        return next((path for path, others in self.also.items() if name in (others or ()) and path in self.stack), None)

    def tied(self, path: str, use: str | None) -> tuple[str, ...]:
        """Further torch names of a looked-up parameter, where it serves several modules.

        Raises:
          AdapterError: nothing tells whether it does.
        """
        others = self.also[path]
        if others and len(others) > 1:
            raise AdapterError(
                f"{path!r} is {1 + len(others)} modules in torch, {', '.join(map(repr, others[:3]))} among them, which "
                "PEFT cannot move as one.\n  leave it out, or use lk.save_adapter"
            )
        if others:
            return others
        name = self.templates[path]
        if use == "tied":
            raise AdapterError(
                f"{path!r} is looked up and multiplied with: it serves two modules, and PEFT adapts modules.\n"
                f"  say by `names` which other: {path!r}: ({name!r}, 'lm_head.weight')"
            )
        module = name.split(".")[-2:-1]
        heads = any(x.endswith("lm_head.weight") for x in self.places)
        if others is None and use is None and module and module[0] in _TABLES and not heads:
            raise AdapterError(
                f"is {path!r}, {name!r} in torch, also the output head of the model? PEFT adapts modules, one by one.\n"
                f"  if so, say it by `names`: ({name!r}, 'lm_head.weight')\n"
                f"  if not: ({name!r},), or give plan=lk.resolve(spec, params, apply_fn, *inputs)"
            )
        return ()

    def need(self, path: str) -> str:
        """The torch name of a path; an error where there is none."""
        if path not in self.templates:
            raise AdapterError(
                f"`names` gives {path!r} no name in torch.\n  closest: {closest(path, list(self.templates))}"
            )
        return self.templates[path]


def plain(name: str) -> TorchName:
    """A name of an array that is nowhere else."""
    return TorchName(name, also=())
