"""How much the subspaces of two deltas share: of ranks, seeds and methods, of the base, and of chance.

    phi(i, j) = |U_i^T V_j|_F^2 / min(i, j)    (Hu et al., arXiv 2106.09685, section 7.2, eq. 4)

Symbols: U_i (d, i) and V_j (d, j) are the leading singular directions of the two, orthonormal. phi is 1 where the
smaller subspace lies within the larger one, and 0 where they are orthogonal. The paper compares those of A alone, which
change when A and B are exchanged for G A and G^-1 B, the same delta; here they are of the delta itself, on the side of
its inputs (the span of A) or of its outputs (that of B).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lorax_kit.algebra.adaptation import AnyAdapter, checked
from lorax_kit.analysis.directions import check_count, check_side, delta_directions
from lorax_kit.core.merge import check_params
from lorax_kit.core.paths import Params, flatten
from lorax_kit.errors import PlanError

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class SiteOverlap(NamedTuple):
    """How the subspaces of A adapters overlap at one site.

    Attributes:
      path: of the parameter.
      directions: (*stack, A), how many directions each adapter has there; 0 where its delta is zero.
      overlap: (*stack, A, A), phi of these; nan where one of the two has none.
      chance: (*stack, A, A), the mean phi of random subspaces of the same sizes; nan as above.
      deviation: (*stack, A, A), its standard deviation.
    """

    path: str
    directions: Int[np.ndarray, "*stack A"]
    overlap: Float[np.ndarray, "*stack A A"]
    chance: Float[np.ndarray, "*stack A A"]
    deviation: Float[np.ndarray, "*stack A A"]


def subspace_overlap(
    one: Float[np.ndarray, "*batch d I"], other: Float[np.ndarray, "*batch d J"]
) -> Float[np.ndarray, "*batch I J"]:
    """phi(i, j) of the first i columns of `one` and the first j of `other`, for all i and j at once.

    Args:
      one, other: orthonormal columns, the leading direction first, as `delta_directions` and `weight_directions` give
        them. A column of nan, the direction of a singular value of zero, makes nan of every phi that it is part of.

    Returns:
      phi, entry [i - 1, j - 1] that of i and j directions; between 0 and 1. Within groups of equal singular values the
      directions, and phi, are not determined but at the end of the group.

    Raises:
      PlanError: they do not share d, or the batch axes.

    Example:
      >>> subspace_overlap(np.eye(4)[:, :2], np.eye(4)[:, 1:3]).tolist()
      [[0.0, 0.0], [1.0, 0.5]]
    """
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if min(one.ndim, other.ndim) < 2 or one.shape[:-1] != other.shape[:-1]:
        raise PlanError(
            f"directions of shape {one.shape} and {other.shape} are not of one space.\n"
            "  all axes but the last must agree: compare inputs with inputs, or outputs with outputs, of one site"
        )
    shared = np.square(np.swapaxes(one, -1, -2) @ other)
    i, j = (np.arange(1, n + 1) for n in shared.shape[-2:])
    grid: np.ndarray = shared.cumsum(axis=-2).cumsum(axis=-1) / np.minimum(i[:, None], j[None])
    return grid


def random_overlap(i: Any, j: Any, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of phi(i, j) for two independent, uniformly random subspaces of `dim` dimensions.

        E |U^T V|_F^2 = i j / d,    Var |U^T V|_F^2 = 2 i (d - i) j (d - j) / (d^2 (d - 1) (d + 2))

    so E phi = max(i, j) / d: overlaps of wide subspaces are large by chance.

    Args:
      i, j: numbers of directions, from 1 to `dim`; arrays broadcast.
      dim: d, the size of the space.

    Returns:
      (mean, deviation), float64.

    Raises:
      PlanError: a number of directions outside 1 to `dim`.

    Example:
      >>> mean, deviation = random_overlap(2, 8, 64)
      >>> float(mean), round(float(deviation), 4)
      (0.125, 0.0404)

    Source: moments of a uniformly random projection, of which i = 1 is the beta distribution B(j/2, (d-j)/2).
    """
    i, j = np.asarray(i, np.float64), np.asarray(j, np.float64)
    if not all(((x >= 1) & (x <= dim)).all() for x in (i, j)):
        raise PlanError(f"{i.tolist()} and {j.tolist()} directions: each must lie between 1 and the dimensions, {dim}.")
    variance = 2 * i * (dim - i) * j * (dim - j) / (dim**2 * max(dim - 1, 1) * (dim + 2))
    return np.maximum(i, j) / dim, np.sqrt(variance) / np.minimum(i, j)


def adapter_overlaps(
    adapters: Iterable[AnyAdapter], base: Params, *, side: str = "inputs", top: int | None = None
) -> list[SiteOverlap]:
    """Pairwise overlaps of several adapters of one base at every site, beside those of random subspaces.

    Args:
      adapters: each a plan with its factors, of any ranks and methods, on the same parameters: what `lk.load_adapter`
        returns, or `lk.algebra.Adaptation(plan, factors)`.
      base: the params that were split.
      side: "inputs" or "outputs".
      top: the leading directions of each delta to compare, at most those that it has; None for all of them, which with
        gains (DoRA, IA3) are about min(in, out): give a number there.

    Returns:
      One `SiteOverlap` a site, in the order of the first plan. Parameters trained in full have no site.

    Raises:
      PlanError: a base that does not fit, another `side`, or a `top` below 1.
      AdapterError: no adapters, those of other parameters, or factors that do not fit their plan or are not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((8, 6))}
      >>> def adapter(rank):
      ...     plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=rank)}), params)
      ...     return lk.algebra.Adaptation(plan, {"w": lk.Factors(a=jnp.eye(rank, 8), b=jnp.eye(rank, 6))})
      >>> found = adapter_overlaps([adapter(1), adapter(4)], params, side="outputs")[0]
      >>> found.directions.tolist(), found.chance[0].round(3).tolist()
      ([1, 4], [0.167, 0.667])
    """
    listed, side = checked(adapters), check_side(side)
    named, _ = flatten(base)
    for adapter in listed:
        check_params(named, adapter.plan)
    if top is not None:
        check_count("top", top)
    rows = []
    for path in (site.path for site in listed[0].plan.sites):
        spans, counts = [], []
        for adapter in listed:
            site = adapter.plan.site(path)
            directions = delta_directions(site, named[path], adapter.factors[path], top)
            span = np.where(np.isnan(x := getattr(directions, side)), 0, x)
            spans.append(span)
            counts.append(np.count_nonzero(directions.values, axis=-1))
        rows.append(_pairs(path, spans, np.stack(counts, axis=-1)))
    return rows


def _pairs(path: str, spans: list[np.ndarray], counts: np.ndarray) -> SiteOverlap:
    """Of spans (*stack, d, k), whose columns beyond `counts` (*stack, A) are zero."""
    shared = [[np.square(np.swapaxes(u, -1, -2) @ v).sum(axis=(-2, -1)) for v in spans] for u in spans]
    i, j = counts[..., :, None], counts[..., None, :]
    mean, deviation = random_overlap(np.maximum(i, 1), np.maximum(j, 1), spans[0].shape[-2])
    none = np.minimum(i, j) == 0
    phi = np.moveaxis(np.array(shared), (0, 1), (-2, -1)) / np.maximum(np.minimum(i, j), 1)
    return SiteOverlap(path, counts, *(np.where(none, np.nan, x) for x in (phi, mean, deviation)))
