"""What a merge loses: how much of an update is left when W' is rounded to a narrow dtype, or quantised again.

    error = |Q(W') - W'|_F      update = |W' - W|_F      lost: entries whose error is at least as large as their update

Of a lost entry the rounded W' is no closer to W' than W was. Where Q keeps W as it is, those are the entries that come
out of the merge as they went in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.algebra.adaptation import AnyAdapter, bases, check_adapter
from lorax_kit.algebra.delta import delta_of, full_delta
from lorax_kit.arrays.dtypes import wide
from lorax_kit.core.lowrank import dense
from lorax_kit.core.merge import beyond
from lorax_kit.core.paths import Params
from lorax_kit.core.quantised import Quantised
from lorax_kit.core.quantised import quantize as quantised
from lorax_kit.core.specs.setting import check_float_dtype
from lorax_kit.errors import AdapterError


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What the merge of one parameter loses.

    Attributes:
      path, shape: of the parameter.
      stored: what it is rounded to: a dtype, or a quantisation.
      update: |W' - W|_F.
      error: |Q(W') - W'|_F.
      changed: entries that the update changes.
      lost: of them, those whose rounding error is at least as large as their update.
    """

    path: str
    shape: tuple[int, ...]
    stored: str
    update: float
    error: float
    changed: int
    lost: int

    @property
    def ratio(self) -> float:
        """error / update: above 1, the merge is further from W' than W was. 0 without an update."""
        return self.error / self.update if self.update else 0.0

    @property
    def share(self) -> float:
        """lost / changed; 0 without changed entries."""
        return self.lost / self.changed if self.changed else 0.0


@dataclass(frozen=True)
class MergeLoss:
    """Rows by parameter, totals, and text: `print(lk.algebra.merge_loss(...))`."""

    rows: tuple[Loss, ...]

    @property
    def total(self) -> Loss:
        """Of all parameters together."""
        stored = {row.stored for row in self.rows}
        norms = [math.hypot(*(getattr(row, name) for row in self.rows)) for name in ("update", "error")]
        return Loss(
            path="all",
            shape=(sum(int(np.prod(row.shape)) for row in self.rows),),
            stored=stored.pop() if len(stored) == 1 else "mixed",
            update=norms[0],
            error=norms[1],
            changed=sum(row.changed for row in self.rows),
            lost=sum(row.lost for row in self.rows),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `sites` and `total`. A number beyond what floats hold is None: JSON has no infinity."""
        sites, total = [
            [_finite(asdict(x) | {"ratio": x.ratio, "share": x.share}) for x in y] for y in (self.rows, [self.total])
        ]
        return {"sites": sites, "total": total[0]}

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        head = ("parameter", "shape", "stored as", "|update|", "|error|", "error/update", "entries lost")
        table = [head]
        for x in (*self.rows, self.total):
            numbers = (f"{x.update:.3g}", f"{x.error:.3g}", f"{x.ratio:.3g}", f"{x.share:.1%}")
            table.append((x.path, "x".join(map(str, x.shape)), x.stored, *numbers))
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = []
        for row in table:
            cells = [c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(x, float) and not np.isfinite(x) else x for k, x in row.items()}


def merge_loss(
    base: Params,
    adapter: AnyAdapter,
    *,
    dtype: str | None = None,
    quantise: str | None = None,
    block: int = 64,
    double: bool = True,
) -> MergeLoss:
    """What of an adapter's update is lost when it is merged and rounded.

    Args:
      base: the frozen params.
      adapter: its plan and factors.
      dtype: of the merged parameters, such as "bfloat16" or "float16".
      quantise: the merged sites are quantised so: "int8", "int4" or "nf4". Without it and `dtype`, each is stored as
        the base stores it: in its dtype, or quantised with its own method and block.
      block, double: as in `lk.quantize`.

    Returns:
      A `MergeLoss`: print it, or read `.rows`, `.total`, `.to_dict()`, `.to_json()`.

    Raises:
      AdapterError: both a dtype and a quantisation, factors that do not fit their plan or are not finite; a
        merged parameter that is not finite, or leaves the range of what it is stored as.
      SpecError: a dtype that is none. PlanError: a base that does not fit, an unknown quantisation.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params)
      >>> tiny = lk.Factors(jnp.ones((1, 4)), jnp.array([[1e-3, 1e-3, 0.5]]))
      >>> print(merge_loss(params, lk.algebra.Adaptation(plan, {"w": tiny}), dtype="bfloat16"))
      parameter  shape  stored as  |update|  |error|  error/update  entries lost
      w          4x3    bfloat16          1  0.00283       0.00283         66.7%
      all        12     bfloat16          1  0.00283       0.00283         66.7%
    """
    if dtype is not None and quantise is not None:
        raise AdapterError("both a dtype and a quantisation were given: a parameter is stored in one way.")
    if dtype is not None:
        check_float_dtype(dtype, "dtype")
    check_adapter(adapter)
    named = bases(adapter, base)
    rows = []
    for site in adapter.plan.sites:
        held = named[site.path]
        method, own_block, own_double = quantise, block, double
        if isinstance(held, Quantised) and dtype is None and quantise is None:
            method, own_block, own_double = held.method, held.block, held.log_step is not None
        w = dense(held)
        delta = site.from_matrices(delta_of(site, held, adapter.factors[site.path]))
        if method is None:
            stored, rounded = _cast(dtype or site.dtype)
        else:
            stored, rounded = f"{method}/{own_block}", _quantised(method, own_block, own_double)
        rows.append(_loss(site.path, w, delta, stored, rounded))
    for leaf in adapter.plan.full:
        w = jnp.asarray(named[leaf.path])
        stored, rounded = _cast(dtype or str(w.dtype))
        rows.append(_loss(leaf.path, w, full_delta(leaf, adapter, named), stored, rounded))
    return MergeLoss(tuple(rows))


def _cast(dtype: str) -> tuple[str, Callable[[Array], Array]]:
    return dtype, lambda x: x.astype(dtype)


def _quantised(method: str, block: int, double: bool) -> Callable[[Array], Array]:
    return lambda x: quantised({"w": x}, ["w"], method, block=block, double=double)["w"].restore()


def _loss(path: str, w: Array, delta: Array, stored: str, rounded: Callable[[Array], Array]) -> Loss:
    """Of one parameter. W' is summed and rounded as `lk.merge` does it, and judged in float64."""
    dtype = wide(w.dtype, delta.dtype)
    summed = w.astype(dtype) + delta.astype(dtype)
    if not np.isfinite(np.asarray(summed, np.float64)).all():
        raise AdapterError(f"{path!r} holds values that are not finite once merged, before it is rounded.")
    merged = rounded(summed).astype(dtype)
    if not np.isfinite(np.asarray(merged, np.float64)).all():
        raise beyond(path, np.max(np.abs(np.asarray(summed, np.float64))), stored)
    change = np.asarray(delta, np.float64)
    error = np.abs(np.asarray(merged, np.float64) - (np.asarray(w.astype(dtype), np.float64) + change))
    changed = change != 0
    return Loss(
        path=path,
        shape=tuple(w.shape),
        stored=stored,
        update=float(np.linalg.norm(change)),
        error=float(np.linalg.norm(error)),
        changed=int(np.sum(changed)),
        lost=int(np.sum(changed & (error >= np.abs(change)))),
    )
