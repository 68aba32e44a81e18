"""What was read of one parameter, as a setting and leaves: stacked matrices joined, ranks padded or reduced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kit.core.method import Method, leaf_shapes
from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import Setting
from lorax_kit.errors import AdapterError, PlanError, SpecError
from lorax_kit.peft.layout import Way, to_site
from lorax_kit.peft.names import Place
from lorax_kit.peft_form import FromPeft, PeftForm, TorchModule

Tensors = Mapping[str, np.ndarray]


class Found(NamedTuple):
    """One matrix with tensors of its own: where it is, how it is read, and what it is in torch."""

    place: Place
    way: Way
    module: TorchModule
    method: Method
    tensors: Tensors
    last: bool


@dataclass
class Pieces:
    """What was read of one parameter.

    Attributes:
      path: of the parameter.
      method: whose form read it.
      way: how torch sees it.
      parts: index along the stacked axes -> what the form read there.
      sizes: of the stacked axes.
      dtypes: of the tensors.
    """

    path: str
    method: Method
    way: Way
    sizes: tuple[int, ...]
    parts: dict[tuple[int, ...], FromPeft] = field(default_factory=dict)
    dtypes: set[str] = field(default_factory=set)

    @property
    def form(self) -> PeftForm:
        """Of the method."""
        assert self.method.peft is not None
        return self.method.peft


def setting_of(pieces: Pieces, dtype: str | None, w: Any, reduce_ranks: bool) -> Setting:
    """The setting of a site; the parts of a stack get one rank and one scale.

    Raises:
      AdapterError: parts that one setting cannot hold.
    """
    kind, form = pieces.method.setting, pieces.form
    if dtype is None:
        with jax.numpy_dtype_promotion("standard"):
            dtype = str(reduce(jnp.promote_types, [jnp.dtype(x) for x in pieces.dtypes or {"float32"}]))
    given = [part.setting for part in pieces.parts.values()]
    try:
        settings = [kind(**{**keys, "dtype": dtype}) for keys in given]
    except (SpecError, TypeError) as e:
        raise AdapterError(f"the adapter does not fit {pieces.path!r}: {e}") from None
    whole = len(pieces.parts) == prod(pieces.sizes)
    if len(set(settings)) > 1 or not whole:
        if not form.product or not _paddable(settings):
            what = "differ from layer to layer" if whole else "lack some layers"
            raise AdapterError(
                f"the modules of {pieces.path!r} {what}, and {kind.kind} has one setting for a stacked parameter.\n"
                "  load it over params whose layers are apart"
            )
        _pad(pieces, settings)
        settings = [max(settings, key=lambda s: s.rank)]  # type: ignore[attr-defined]
    setting = settings[0]
    limit = min(prod(pieces.way.inputs), pieces.way.outputs)
    if form.product and setting.rank > limit:  # type: ignore[attr-defined]
        if not reduce_ranks:
            rank = setting.rank  # type: ignore[attr-defined]
            raise PlanError(
                f"rank {rank} at {pieces.path!r} is above min(in, out) = {limit}.\n"
                "  load_peft(..., reduce_ranks=True) makes it one of that rank, which holds the same update"
            )
        for index, part in pieces.parts.items():
            pieces.parts[index] = part._replace(leaves=_reduced(part.leaves, limit))
        scale = setting.scale * (limit**0.5 if setting.rslora else limit)  # type: ignore[attr-defined]
        setting = replace(setting, rank=limit, alpha=scale)  # type: ignore[call-arg]
    return setting


def _paddable(settings: list[Setting]) -> bool:
    """Whether they differ in ranks and scales alone."""
    free = {"rank": 1, "alpha": None}
    return len({replace(s, **free) for s in settings}) == 1  # type: ignore[arg-type]


def _pad(pieces: Pieces, settings: list[Setting]) -> None:
    """Zero rows up to the highest rank, the scale of that one, zeros for layers without an adapter."""
    first = max(settings, key=lambda s: s.rank)  # type: ignore[attr-defined]
    names = set().union(*(part.leaves for part in pieces.parts.values()))
    if names != {"a", "b"}:
        raise AdapterError(
            f"the modules of {pieces.path!r} differ in their ranks or scales, or some have no adapter.\n"
            "  load it over params whose layers are apart"
        )
    for (index, part), setting in zip(list(pieces.parts.items()), settings, strict=True):
        rows = first.rank - setting.rank  # type: ignore[attr-defined]
        a, b = (np.pad(part.leaves[k].astype(np.float64), ((0, rows), (0, 0))) for k in "ab")
        factor = setting.scale / first.scale
        pieces.parts[index] = part._replace(leaves={"a": a, "b": b * factor if factor != 1 else b})
    shapes = {k: x.shape for k, x in next(iter(pieces.parts.values())).leaves.items()}
    for index in np.ndindex(*pieces.sizes):
        pieces.parts.setdefault(index, FromPeft({}, {k: np.zeros(s) for k, s in shapes.items()}))


def _reduced(leaves: dict[str, Any], rank: int) -> dict[str, Any]:
    """Factors of the same product with `rank` rows, balanced, from its singular values in float64."""
    if leaves.get("a0") is not None:
        raise AdapterError("factors that begin at a start of their own cannot be reduced.")
    a, b = (leaves[k].astype(np.float64) for k in "ab")
    u, s, v = np.linalg.svd(a.T @ b, full_matrices=False)
    root = np.sqrt(s[:rank, None])
    return leaves | {"a": root * u[:, :rank].T, "b": root * v[:rank]}


def leaves_of(site: Site, pieces: Pieces) -> Any:
    """The leaves of a site, in its setting's dtype."""
    expected, form = leaf_shapes(site), pieces.form
    order = sorted(pieces.parts)
    out: dict[str, Any] = {}
    for name, want in expected._asdict().items():
        if want is None:
            out[name] = None
            continue
        by_index = {}
        for index in order:
            if name not in pieces.parts[index].leaves:
                raise AdapterError(f"nothing in the folder gives {name!r} of {site.path!r}.")
            by_index[index] = np.asarray(pieces.parts[index].leaves[name])
        x = to_site(site, pieces.way, form.axes_of(site.setting)[name], by_index)
        if x.shape != want.shape:
            raise AdapterError(f"{name} of {site.path!r} has shape {x.shape}; its setting expects {want.shape}.")
        out[name] = jnp.asarray(x, want.dtype)
    return type(expected)(**out)
