"""Intruder dimensions: leading singular vectors of W' that are like none of W (Shuttleworth et al., arXiv 2410.21228).

    y_j intrudes  <=>  max_i |cos(y_j, x_i)| < epsilon,   j among the top k

Symbols: x_i are all singular vectors of W, y_j those of W' = W + delta. The paper takes the left ones of a (out, in)
matrix: our outputs; its code has epsilon = 0.5 and k = 10. An intruder need not lie outside the span of the x_i, which
for a square W of full rank is everything: it is spread over many of them, as nearly every vector of random direction
is. Hence two controls of the count:

    random    U diag(s) V^T of the delta's own singular values s and uniformly random directions U, V
    spread    a Gaussian matrix of the delta's own Frobenius norm, over all singular directions: the same size, no rank

An adapter that learned nothing of W's directions has as many intruders as `random`; what both have and `spread` does
not comes of a norm held in few directions, whichever they are (a spike that leaves the bulk of W: Xie, arXiv
2607.23711).

Whether intruders cause forgetting is asked by scaling them (2410.21228), and disputed: to scale them is also to change
the size of the update. So an answer needs controls of the same size: `lorax_kit.analysis.interventions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import numpy as np

from lorax_kit.analysis.deltas import SiteDelta, singular_values, site_delta
from lorax_kit.analysis.directions import check_count, check_side
from lorax_kit.arrays.svd import leading
from lorax_kit.core.leaves import FactorTree, check_factors
from lorax_kit.core.lowrank import dense
from lorax_kit.core.merge import check_params
from lorax_kit.core.paths import Params, flatten
from lorax_kit.core.plan import Plan
from lorax_kit.core.site import Site
from lorax_kit.errors import PlanError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

TOP, EPSILON = 10, 0.5


class SiteIntruders(NamedTuple):
    """How near the leading singular vectors of W' at one site are to any of W; `count_intruders` counts.

    Attributes:
      path: of the parameter.
      adapter: (*stack, k), max |cos| with the singular vectors of W, of W' with the trained delta.
      random: (draws, *stack, k), with a delta of the same singular values and random directions.
      spread: (draws, *stack, k), with a Gaussian delta of the same Frobenius norm.
    """

    path: str
    adapter: Float[np.ndarray, "*stack k"]
    random: Float[np.ndarray, "draws *stack k"]
    spread: Float[np.ndarray, "draws *stack k"]


def count_intruders(similarity: Float[np.ndarray, "*batch k"], epsilon: Any = EPSILON) -> Int[np.ndarray, "*batch *e"]:
    """Count the intruders among k singular vectors, for one epsilon or several.

    Args:
      similarity: (*batch, k), max |cos| of each vector.
      epsilon: in (0, 1]: a number, or (E,) of them.

    Returns:
      (*batch,), or (*batch, E).

    Raises:
      PlanError: an epsilon outside (0, 1].

    Example:
      >>> count_intruders(np.array([0.1, 0.45, 0.99]), [0.2, 0.5]).tolist()
      [1, 2]
    """
    limit = np.asarray(epsilon, np.float64)
    if not ((limit > 0) & (limit <= 1)).all():
        raise PlanError(f"epsilon is {limit.tolist()}; it is a cosine, in (0, 1].")
    below = np.asarray(similarity)[..., None] < limit.reshape(-1)
    counts: np.ndarray = np.count_nonzero(below, axis=-2)
    return counts if limit.ndim else counts[..., 0]


def adapter_intruders(
    plan: Plan,
    base: Params,
    factors: FactorTree,
    *,
    top: int = TOP,
    side: str = "outputs",
    draws: int = 1,
    seed: int = 0,
) -> list[SiteIntruders]:
    """Compare the leading singular vectors of W' with those of W at every site, beside both controls.

    Every site is decomposed once whole, and its `top` directions 1 + 2 `draws` times, on the host in float64.

    Args:
      plan: from `lk.resolve`.
      base: the params that were split.
      factors: the tree that `lk.split` returns, trained.
      top: k; less at sites that have fewer directions.
      side: "outputs", as in the paper, or "inputs".
      draws: how many random deltas of each control.
      seed: of the draws, which differ by site.

    Returns:
      One `SiteIntruders` a site, in the order of the plan. Parameters trained in full have no site.

    Raises:
      PlanError: a base that does not fit the plan, another `side`, a `top` or `draws` that is no integer above 0.
      AdapterError: factors that do not fit the plan, or a delta that is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1, alpha=1, inputs=(0,))}), params)
      >>> spike = lk.Factors(a=jnp.ones((1, 4)), b=100 * jnp.ones((1, 4)))
      >>> adapter_intruders(plan, params, {"w": spike}, top=2)[0].adapter.round(2).tolist()
      [0.5, 0.83]
    """
    check_count("draws", draws)
    rows = []
    for site, w, delta in matrices_of(plan, base, factors, top, side):
        rng, k, (values,) = generator(site, seed), min(top, site.max_rank), singular_values([delta])
        stacked = []
        for before, update, s in zip(w, delta.matrices(), values, strict=True):
            basis = directions_of(before, side)
            arms = [update, *(random_matrix(s, before.shape, rng) for _ in range(draws))]
            arms += [_spread(float(np.linalg.norm(s)), before.shape, rng) for _ in range(draws)]
            stacked.append([nearest(basis, directions_of(before + arm, side, k)) for arm in arms])
        by_arm = np.swapaxes(np.array(stacked), 0, 1).reshape(1 + 2 * draws, *site.stack_shape, k)
        rows.append(SiteIntruders(site.path, by_arm[0], by_arm[1 : 1 + draws], by_arm[1 + draws :]))
    return rows


def matrices_of(
    plan: Plan, base: Params, factors: FactorTree, top: Any, side: Any
) -> Iterator[tuple[Site, Float[np.ndarray, "S K N"], SiteDelta]]:
    """Every site of an adapter with its W and its delta, float64, one site at a time.

    Raises:
      PlanError, AdapterError: as `adapter_intruders`.
    """
    check_factors(plan, factors)
    named, _ = flatten(base)
    check_params(named, plan)
    check_side(side)
    check_count("top", top)
    for site in plan.sites:
        w = site.matrices(np.asarray(dense(named[site.path]))).astype(np.float64)
        yield site, w, site_delta(site, named[site.path], factors[site.path])


def generator(site: Site, seed: int) -> np.random.Generator:
    """Of the draws of one site, whichever others there are."""
    return np.random.default_rng([seed, crc32(site.path.encode())])


def directions_of(matrix: Float[np.ndarray, "K N"], side: str, top: int | None = None) -> Float[np.ndarray, "d m"]:
    """Leading singular vectors of one matrix on one side, as columns; without `top` all, but those of zeros."""
    u, s, vt = leading(matrix, min(matrix.shape) if top is None else top)
    x = u if side == "inputs" else vt.T
    return x if top is not None else x[:, s > max(matrix.shape) * np.finfo(np.float64).eps * s[0]]


def nearest(basis: Float[np.ndarray, "d m"], vectors: Float[np.ndarray, "d k"]) -> Float[np.ndarray, " k"]:
    """max |cos| of each vector with the columns of the basis."""
    cosines: np.ndarray = np.abs(basis.T @ vectors).max(axis=0, initial=0.0)
    return cosines


def random_matrix(
    singular_values: Float[np.ndarray, " r"], shape: tuple[int, int], rng: np.random.Generator
) -> Float[np.ndarray, "K N"]:
    """A matrix of these singular values whose directions are uniformly random (signs do not matter to either)."""
    s = singular_values[singular_values != 0]
    u, v = (np.linalg.qr(rng.normal(size=(n, len(s))))[0] for n in shape)
    product: np.ndarray = (u * rng.choice([-1.0, 1.0], size=len(s)) * s) @ v.T
    return product


def _spread(norm: float, shape: tuple[int, int], rng: np.random.Generator) -> Float[np.ndarray, "K N"]:
    """A Gaussian matrix of this Frobenius norm."""
    x = rng.normal(size=shape)
    return np.asarray(x * (norm / np.linalg.norm(x)))
