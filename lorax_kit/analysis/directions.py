"""Singular directions of deltas and of parameters, on the host in float64.

    A^T = Q_a R_a,   B^T = Q_b R_b,   R_a R_b^T = U S V^T   =>   delta = A^T B = (Q_a U) S (Q_b V)^T

Symbols: A is (R, in) and B (R, out), the rows of the update in its normal form. With gains the delta is decomposed
whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lorax_kit.analysis.deltas import site_delta, triangles, without_rounding
from lorax_kit.arrays.svd import leading
from lorax_kit.core.lowrank import dense
from lorax_kit.core.site import Site
from lorax_kit.errors import PlanError

if TYPE_CHECKING:
    from jaxtyping import Float

SIDES = ("inputs", "outputs")


class Directions(NamedTuple):
    """Singular triples, largest value first, in float64.

    Attributes:
      values: (*stack, k), 0 where a value is within rounding of zero.
      inputs: (*stack, in, k), orthonormal columns over the flattened inputs; nan where the value is 0, whose direction
        is noise.
      outputs: (*stack, out, k), the same over the outputs.
    """

    values: Float[np.ndarray, "*stack k"]
    inputs: Float[np.ndarray, "*stack in k"]
    outputs: Float[np.ndarray, "*stack out k"]


def delta_directions(site: Site, base: Any, leaves: Any, top: int | None = None) -> Directions:
    """Singular directions of W' - W at a site, of any method, gains included.

    Args:
      site: of the plan.
      base: the parameter, in its own layout, quantised or not.
      leaves: the site's, trained.
      top: how many, at most those that there are; None for all of them.

    Returns:
      k = min(R, in, out) triples for R rows in the update, min(in, out) of them where it has gains; or `top`.

    Raises:
      PlanError: `top` is no integer above 0.
      AdapterError: the delta is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2, alpha=2)}), params)
      >>> leaves = lk.Factors(a=jnp.eye(2, 4), b=jnp.array([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
      >>> found = delta_directions(plan.site("w"), params["w"], leaves)
      >>> found.values.tolist(), np.abs(found.inputs[:, 0]).tolist(), np.isnan(found.inputs[:, 1]).all().tolist()
      ([3.0, 0.0], [1.0, 0.0, 0.0, 0.0], True)
    """
    k = _count(site, top)
    delta = site_delta(site, base, leaves)
    if delta.whole is not None:
        u, values, v = _decomposed(delta.whole, k)
    else:
        q_a, r_a, q_b, r_b = triangles(delta)
        u, values, vt = np.linalg.svd(r_a @ np.swapaxes(r_b, 1, 2), full_matrices=False)
        u, values, v = q_a @ u[..., :k], values[:, :k], q_b @ np.swapaxes(vt, 1, 2)[..., :k]
    return _directions(site, u, without_rounding(values, delta.rounding), v)


def weight_directions(site: Site, base: Any, top: int | None = None) -> Directions:
    """Singular directions of the parameter W of a site: what those of its delta are compared with.

    Args:
      site: of the plan.
      base: the parameter, in its own layout, quantised or not.
      top: how many, at most the min(in, out) that there are; None for all of them.

    Raises:
      PlanError: `top` is no integer above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.diag(jnp.array([1.0, 5.0, 2.0]))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1, inputs=(0,))}), params)
      >>> np.abs(weight_directions(plan.site("w"), params["w"], top=1).outputs)[:, 0].tolist()
      [0.0, 1.0, 0.0]
    """
    w = site.matrices(np.asarray(dense(base))).astype(np.float64)
    u, values, v = _decomposed(w, _count(site, top))
    eps = np.finfo(np.float64).eps
    return _directions(site, u, without_rounding(values, max(w.shape[1:]) * eps * values[:, 0]), v)


def check_count(name: str, count: Any) -> int:
    """`count`, checked.

    Raises:
      PlanError: it is not an integer of at least 1.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise PlanError(f"{name} is {count!r}; it must be an integer of at least 1.")
    return count


def check_side(side: Any) -> str:
    """`side`, checked.

    Raises:
      PlanError: it is neither "inputs" nor "outputs".
    """
    if side not in SIDES:
        raise PlanError(f"side is {side!r}; it must be 'inputs' or 'outputs', the directions to compare.")
    return str(side)


def _count(site: Site, top: Any) -> int:
    return site.max_rank if top is None else min(check_count("top", top), site.max_rank)


def _decomposed(matrices: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(u (S, K, top), s (S, top), v (S, N, top))."""
    u, s, vt = (np.stack(x) for x in zip(*(leading(m, top) for m in matrices), strict=True))
    return u, s, np.swapaxes(vt, 1, 2)


def _directions(site: Site, u: np.ndarray, values: np.ndarray, v: np.ndarray) -> Directions:
    there = values[:, None] > 0
    arrays = (values, *(np.where(there, x, np.nan) for x in (u, v)))
    return Directions(*(x.reshape(*site.stack_shape, *x.shape[1:]) for x in arrays))
