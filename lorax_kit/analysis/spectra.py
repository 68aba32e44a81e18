"""Singular values of the deltas of an adapter, and what they say about the rank that was really used.

    delta = s A^T B,   A^T = Q_a R_a,   B^T = Q_b R_b   =>   sigma(delta) = |s| sigma(R_a R_b^T)

Symbols: A is `a` (r, in), B is `b` (r, out), s is `scale`. Q_a and Q_b are orthonormal, so the (in, out)
matrix is never formed: the cost is two thin QR factorisations and the SVD of an r x r core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lorax_kit.analysis.deltas import singular_values, site_delta
from lorax_kit.arrays.svd import one_by_one
from lorax_kit.core.leaves import FactorTree, check_factors
from lorax_kit.core.merge import check_params
from lorax_kit.core.paths import Params, flatten
from lorax_kit.core.plan import Plan
from lorax_kit.core.site import Site

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def delta_spectrum(
    a: Float[Array, " r *batch_and_in"],
    b: Float[Array, " r *batch_and_out"],
    scale: ArrayLike = 1.0,
    *,
    batch_axes: int = 0,
) -> Float[Array, "*batch k"]:
    """Singular values of `scale * a^T b`, largest first, without forming the product.

    Pure and jit/vmap friendly. Works in float32, or float64 when an input is.

    Args:
      a: (r, *batch, *in); the input axes are flattened.
      b: (r, *batch, *out); the output axes are flattened.
      scale: Scalar, or an array of the batch shape; its sign does not matter.
      batch_axes: Number of axes after r that `a` and `b` share and that index separate matrices, e.g. 1 for
        stacked layers (r, L, in), (r, L, out).

    Returns:
      (*batch, k) with k = min(r, in, out): the other singular values are zero. A delta of zeros gives zeros.

    Raises:
      ValueError: `a` and `b` differ in r or in the batch axes.

    Example:
      >>> a, b = jnp.eye(2, 5), jnp.array([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
      >>> delta_spectrum(a, b, 0.5).tolist()
      [2.0, 1.5]

    Source: product SVD through QR, Golub & Van Loan, "Matrix Computations", section 5.4.
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    lead = 1 + batch_axes
    if a.shape[:lead] != b.shape[:lead] or min(a.ndim, b.ndim) < lead:
        raise ValueError(
            f"a {a.shape} and b {b.shape} must share their first {lead} axes (rank, then batch).\n"
            "  next: factors are stored rank-first; set batch_axes to the number of stacked axes."
        )
    wide = jnp.float64 if jnp.float64 in (a.dtype, b.dtype) else jnp.float32
    batch = a.shape[1:lead]

    def triangle(factor: Array) -> Array:
        thin = factor.astype(wide).reshape(*factor.shape[:lead], math.prod(factor.shape[lead:]))
        return one_by_one(lambda x: jnp.linalg.qr(x, mode="r"))(jnp.moveaxis(thin, 0, -1))

    core = jnp.matmul(triangle(a), jnp.swapaxes(triangle(b), -1, -2), precision="highest")
    values = one_by_one(lambda x: jnp.linalg.svd(x, compute_uv=False))(core)
    factor = jnp.broadcast_to(jnp.abs(jnp.asarray(scale)).astype(wide), batch)
    return values * factor[..., None]


class SiteSpectrum(NamedTuple):
    """The spectrum of one site, of what an adapter adds or of a gradient.

    Attributes:
      path: of the parameter.
      singular_values: (*stack, k), float64, largest first.
      effective_rank: (*stack,), exp of the entropy of the singular values.
      rank_for_energy: (*stack,), how many hold the share of |.|_F^2 that was asked for.
    """

    path: str
    singular_values: Float[np.ndarray, "*stack k"]
    effective_rank: Float[np.ndarray, "*stack"]
    rank_for_energy: Int[np.ndarray, "*stack"]


def site_spectrum(site: Site, w: Array, leaves: Any) -> Float[np.ndarray, "*stack k"]:
    """Singular values of W' - W at a site, largest first, of any method: what it adds to the parameter, gains included.

    Args:
      site: of the plan.
      w: the parameter, in its own layout, quantised or not.
      leaves: the site's, trained.

    Returns:
      (*stack, k), float64; what is within rounding of zero is 0. Without gains k = min(R, in, out) for R rows of the
      update, and they alone are decomposed; with gains k = min(in, out).

    Raises:
      AdapterError: the delta is not finite.
    """
    return singular_values([site_delta(site, w, leaves)])[0].reshape(*site.stack_shape, -1)


def adapter_spectra(plan: Plan, base: Params, factors: FactorTree, *, energy: float = 0.9) -> list[SiteSpectrum]:
    """Spectra of W' - W at every site of an adapter, of any methods, gains included.

    Rows of one shape are decomposed together. Parameters trained in full have no site, and are left out.

    Args:
      plan: from `lk.resolve`.
      base: the params that were split.
      factors: the tree that `lk.split` returns, trained.
      energy: share of |delta|_F^2, in (0, 1].

    Returns:
      One `SiteSpectrum` a site, in the order of the plan.

    Raises:
      ValueError: `energy` outside (0, 1].
      PlanError: a base that does not fit the plan.
      AdapterError: factors that do not fit the plan, or a delta that is not finite.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2, alpha=2)}), params)
      >>> factors = {"w": lk.Factors(a=jnp.eye(2, 4), b=jnp.array([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))}
      >>> found = adapter_spectra(plan, params, factors)[0]
      >>> found.path, found.singular_values.tolist(), round(float(found.effective_rank), 6), int(found.rank_for_energy)
      ('w', [3.0, 3.0], 2.0, 2)
    """
    check_factors(plan, factors)
    named, _ = flatten(base)
    check_params(named, plan)
    deltas = [site_delta(site, named[site.path], factors[site.path]) for site in plan.sites]
    return spectra(plan.sites, singular_values(deltas), energy)


def spectra(sites: Sequence[Site], values: Sequence[np.ndarray], energy: float) -> list[SiteSpectrum]:
    """Singular values (S, k) of each site with the ranks that they tell."""
    rows = []
    for site, flat in zip(sites, values, strict=True):
        s = flat.reshape(*site.stack_shape, flat.shape[-1])
        rows.append(SiteSpectrum(site.path, s, *map(np.asarray, (effective_rank(s), rank_for_energy(s, energy)))))
    return rows


def effective_rank(singular_values: Float[ArrayLike, "*batch k"]) -> Float[Array, "*batch"]:
    """exp(entropy) of the singular values normalised to sum 1: a rank that counts small ones less.

    Equal to k for k equal values, near 1 when one dominates, and 0 for a delta of zeros.

    Args:
      singular_values: (*batch, k), non-negative, any order; an array of numpy, or of jax, under `jit`, too.

    Returns:
      (*batch,), between 1 and k (0 where all values are zero), of the library and dtype of the values.

    Example:
      >>> float(effective_rank(jnp.array([2.0, 2.0, 0.0])))
      2.0

    Source: Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    s, xp = _array(singular_values)
    total = xp.sum(s, axis=-1, keepdims=True)
    share = s / xp.where(total > 0, total, 1)
    entropy = -xp.sum(share * xp.log(xp.where(share > 0, share, 1)), axis=-1)
    return xp.where(total[..., 0] > 0, xp.exp(entropy), 0)


def rank_for_energy(singular_values: Float[ArrayLike, "*batch k"], energy: float = 0.9) -> Int[Array, "*batch"]:
    """The smallest number of singular directions that hold `energy` of |delta|_F^2.

    Args:
      singular_values: (*batch, k), non-negative, any order; an array of numpy, or of jax, under `jit`, too.
      energy: Share of the squared Frobenius norm, in (0, 1].

    Returns:
      (*batch,) int32, between 1 and k (0 where all values are zero), of the library of the values.

    Raises:
      ValueError: `energy` outside (0, 1].

    Example:
      >>> int(rank_for_energy(jnp.array([3.0, 1.0, 0.5]), 0.9))  # 9 of 10.25 is 88 %, 10 of 10.25 is 98 %
      2
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy is a share in (0, 1], got {energy}.")
    s, xp = _array(singular_values)
    s = -xp.sort(-s, axis=-1)
    # Dividing by the largest first keeps the squares of tiny deltas from underflowing.
    top = s[..., :1]
    held = xp.cumsum(xp.square(s / xp.where(top > 0, top, 1)), axis=-1)
    count = 1 + xp.sum(held < energy * held[..., -1:], axis=-1, dtype=xp.int32)
    return xp.where(xp.any(s > 0, axis=-1), count, 0)


def _array(values: Any) -> tuple[Any, Any]:
    """The values as an array, and its library: numpy's stay on the host, in their precision."""
    if isinstance(values, np.ndarray):
        return values, np
    return jnp.asarray(values), jnp
