"""Adapters of another rank: cut by the singular value decomposition of their delta, or grown; and any method as LoRA.

    delta = A^T B,   A^T = Q_a R_a,   B^T = Q_b R_b,   R_a R_b^T = U S V^T   =>   delta = (Q_a U) S (Q_b V)^T

Of rows alone only thin matrices are factorised, and the (in, out) matrix is never formed. All of it runs in float64 on
the host. `a` is given orthonormal directions and `b` the singular values: as training leaves them, b is the small one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.algebra.adaptation import (
    Adaptation,
    AnyAdapter,
    bases,
    check_adapter,
    check_key,
    check_rank,
    check_result,
    check_share,
    plain,
)
from lorax_kit.algebra.delta import Rows, delta_of, normal_form, rows_of, shaped, whole
from lorax_kit.core.method import Hints
from lorax_kit.core.paths import Params
from lorax_kit.core.site import Site
from lorax_kit.errors import AdapterError
from lorax_kit.methods.lora import LoRA, first_factors

if TYPE_CHECKING:
    from jaxtyping import Float


def to_lora(
    adapter: AnyAdapter, base: Params | None = None, *, rank: int | None = None, energy: float | None = None
) -> Adaptation:
    """An adapter of any method as plain LoRA of scale 1.

    Args:
      adapter: its plan and factors.
      base: the frozen params; needed by methods whose delta depends on them: those with gains (DoRA, IA3), HRA, DeLoRA.
      rank: the highest rank of a site; None for all rows of its update, or min(in, out) where it has gains.
      energy: the share of |delta|_F^2 that each stacked matrix keeps, in (0, 1]; the rank is the least that does.

    Returns:
      The adapter; its `errors` say how far each site's delta is from that of the method: 0 where nothing was cut. What
      is trained in full stays as it is.

    Raises:
      AdapterError: what is no adapter, factors that are not finite, a base that is needed, a rank above min(in, out),
        an energy outside (0, 1].
      PlanError: a base that does not fit the plan.

    Example:
      >>> import jax
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.arange(12.0).reshape(4, 3)}
      >>> plan = lk.resolve(lk.Spec({"w": lk.DoRA(rank=1)}), params)
      >>> factors = lk.split(params, plan, jax.random.key(0))[1]
      >>> factors = {"w": factors["w"]._replace(magnitude=2 * factors["w"].magnitude)}
      >>> lora = to_lora(Adaptation(plan, factors), params, rank=2)
      >>> lora.plan.site("w").setting.kind, lora.errors["w"] < 1e-6
      ('lora', True)
    """
    check_adapter(adapter)
    plan = adapter.plan
    check_rank(rank, plan.sites)
    energy = None if energy is None else check_share("energy", energy)
    named = bases(adapter, base)
    rows, errors = {}, {}
    for site in plan.sites:
        leaves, w = adapter.factors[site.path], named.get(site.path)
        update = normal_form(site, w, leaves)
        if update.a is not None and update.b is not None and update.out_gain is None and update.in_gain is None:
            rows[site.path], errors[site.path] = cut(site, Rows(update.a, update.b), rank, energy)
        else:
            rows[site.path], errors[site.path] = _cut_delta(site, w, leaves, rank, energy)
    full = {leaf.path: jnp.asarray(adapter.factors[leaf.path].value) for leaf in plan.full}
    return plain([plan], rows, full, errors)


def truncate(
    adapter: AnyAdapter, *, rank: int | None = None, energy: float | None = None, base: Params | None = None
) -> Adaptation:
    """The closest adapter of a lower rank, by the singular value decomposition of each delta.

    Args:
      rank, energy, base: as in `to_lora`; at least one of the first two. With both, the lower rank.

    Raises:
      AdapterError: as `to_lora`; neither a rank nor an energy.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), params)
      >>> factors = {"w": lk.Factors(jnp.eye(2, 4), jnp.array([[3.0, 0, 0], [0, 4.0, 0]]))}
      >>> truncate(Adaptation(plan, factors), rank=1).errors
      {'w': 0.6}
    """
    _check_cut(rank, energy)
    return to_lora(adapter, base, rank=rank, energy=energy)


def grow(adapter: AnyAdapter, rank: int, key: Array, *, base: Params | None = None) -> Adaptation:
    """The same delta in more rows, so that training can go on at a higher rank.

    The rows that were there stay, the scale folded into them; the new ones are what `lk.split` with this key starts
    those rows with, a drawn and b zero (of a lookup the other way round). Rows of two zeros would never move.

    Args:
      rank: of every site; a site of more rows is cut down by `truncate` first.
      key: a JAX random key.
      base: as in `to_lora`.

    Raises:
      AdapterError: as `to_lora`; a site that has more rows than `rank`; a key that is none.

    Example:
      >>> import jax
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params)
      >>> small = Adaptation(plan, lk.split(params, plan, jax.random.key(0))[1])
      >>> grow(small, 3, jax.random.key(1)).factors["w"].a.shape
      (3, 4)
    """
    check_adapter(adapter)
    plan, named = adapter.plan, bases(adapter, base)
    if rank is None:
        raise AdapterError("rank is None; it must be an integer of at least 1.")
    check_rank(rank, plan.sites)
    check_key(key)
    rows = {}
    for site in plan.sites:
        have = rows_of(site, named.get(site.path), adapter.factors[site.path])
        count = have.a.shape[0]
        if count > rank:
            raise AdapterError(
                f"{site.path!r} has {count} rows, more than rank {rank}.\n  cut it: truncate(adapter, rank={rank})"
            )
        drawn = first_factors(replace(site, setting=LoRA(rank=rank)), jnp.zeros(()), key, Hints())
        grown = [jnp.concatenate([x, new[count:].astype(x.dtype)]) for x, new in zip(have, drawn[:2], strict=True)]
        rows[site.path] = Rows(*grown)
    full = {leaf.path: jnp.asarray(adapter.factors[leaf.path].value) for leaf in plan.full}
    return plain([plan], rows, full)


def _check_cut(rank: Any, energy: Any) -> None:
    if rank is None and energy is None:
        raise AdapterError("neither a rank nor an energy was given: there is nothing to cut by.")


def cut(site: Site, rows: Rows, rank: int | None, energy: float | None) -> tuple[Rows, float]:
    """The leading singular triples of rows, and the relative error: as they are where nothing is to be cut.

    Raises:
      AdapterError: rows that are not finite.
    """
    check_result(site.path, *rows)
    have = rows.a.shape[0]
    if energy is None and (rank is None or have <= rank):
        return rows, 0.0
    s, dtype = int(np.prod(site.stack_shape)), rows.a.dtype
    a, b = (np.moveaxis(np.asarray(x, np.float64).reshape(have, s, -1), 0, 2) for x in rows)  # (S, K, R), (S, N, R)
    if have >= site.max_rank:
        return _leading(site, *np.linalg.svd(a @ np.swapaxes(b, 1, 2), full_matrices=False), rank, energy, dtype)
    (q_a, r_a), (q_b, r_b) = np.linalg.qr(a), np.linalg.qr(b)
    u, values, vt = np.linalg.svd(r_a @ np.swapaxes(r_b, 1, 2), full_matrices=False)
    return _leading(site, q_a @ u, values, vt @ np.swapaxes(q_b, 1, 2), rank, energy, dtype)


def _cut_delta(site: Site, w: Any, leaves: Any, rank: int | None, energy: float | None) -> tuple[Rows, float]:
    delta = delta_of(site, w, leaves)
    return cut_whole(site, delta, rank, energy, delta.dtype)


def cut_whole(
    site: Site, delta: Float[Any, "S K N"], rank: int | None, energy: float | None, dtype: Any
) -> tuple[Rows, float]:
    """`cut` of the matrices themselves; min(in, out) rows where nothing is to be cut. The rows are of `dtype`."""
    check_result(site.path, delta)
    if rank is None and energy is None:
        return whole(site, jnp.asarray(delta, dtype)), 0.0
    svd = np.linalg.svd(np.asarray(delta, np.float64), full_matrices=False)
    return _leading(site, *svd, rank, energy, dtype)


def _leading(
    site: Site, u: np.ndarray, s: np.ndarray, vt: np.ndarray, rank: int | None, energy: float | None, dtype: Any
) -> tuple[Rows, float]:
    """The triples (S, K, R), (S, R), (S, R, N) that are kept, as rows; one rank for all stacked matrices."""
    squares = s**2
    kept = s.shape[1]
    if energy is not None:
        total = np.sum(squares, axis=1, keepdims=True)
        # What sums in another order may differ by is no reason for a row more.
        lacking = np.cumsum(squares, axis=1) < energy * total * (1 - 1e-12)
        kept = min(kept, 1 + int(np.max(np.sum(lacking, axis=1), initial=0)))
    kept = kept if rank is None else min(kept, rank)
    error = np.sqrt(np.sum(squares[:, kept:]) / np.sum(squares)) if np.any(squares) else 0.0
    a = np.transpose(u[..., :kept], (2, 0, 1))
    b = np.moveaxis(s[:, :kept, None] * vt[:, :kept], 1, 0)
    with np.errstate(over="ignore"):  # singular values beyond the dtype become infinities, which `plain` refuses
        return shaped(site, jnp.asarray(a, dtype), jnp.asarray(b, dtype)), float(error)
