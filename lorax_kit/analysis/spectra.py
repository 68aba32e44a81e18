"""Singular values of a low-rank delta, and what they say about the rank that was really used.

    delta = s A^T B,   A^T = Q_a R_a,   B^T = Q_b R_b   =>   sigma(delta) = |s| sigma(R_a R_b^T)

Symbols: A is `a` (r, in), B is `b` (r, out), s is `scale`. Q_a and Q_b are orthonormal, so the (in, out)
matrix is never formed: the cost is two thin QR factorisations and the SVD of an r x r core.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lorax_kit.core.merge import delta
from lorax_kit.core.method import update_of
from lorax_kit.core.site import Site
from lorax_kit.svd import one_by_one

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


def site_spectrum(site: Site, w: Array, leaves: Any) -> np.ndarray:
    """Singular values of W' - W at a site, largest first, of any method: what it adds to the parameter, gains included.

    Args:
      site: of the plan.
      w: the parameter, in its own layout.
      leaves: the site's, trained.

    Returns:
      (*stack, k), float32 or wider: from the rows of the update alone where there are no gains.
    """
    update = update_of(site, w, leaves, site.scale)
    if update.a is not None and update.b is not None and update.out_gain is None and update.in_gain is None:
        return np.asarray(delta_spectrum(update.a, update.b, site.scale, batch_axes=len(site.axes.stack)))
    values = np.linalg.svd(np.asarray(site.matrices(delta(site, w, leaves))), compute_uv=False)
    return values.reshape(*site.stack_shape, -1)


def effective_rank(singular_values: Float[Array, "*batch k"]) -> Float[Array, "*batch"]:
    """exp(entropy) of the singular values normalised to sum 1: a rank that counts small ones less.

    Equal to k for k equal values, near 1 when one dominates, and 0 for a delta of zeros.

    Args:
      singular_values: (*batch, k), non-negative, any order.

    Returns:
      (*batch,), between 1 and k (0 where all values are zero).

    Example:
      >>> float(effective_rank(jnp.array([2.0, 2.0, 0.0])))
      2.0

    Source: Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    s = jnp.asarray(singular_values)
    total = jnp.sum(s, axis=-1, keepdims=True)
    share = s / jnp.where(total > 0, total, 1)
    entropy = jnp.sum(jax.scipy.special.entr(share), axis=-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0)


def rank_for_energy(singular_values: Float[Array, "*batch k"], energy: float = 0.9) -> Int[Array, "*batch"]:
    """The smallest number of singular directions that hold `energy` of |delta|_F^2.

    Args:
      singular_values: (*batch, k), non-negative, any order.
      energy: Share of the squared Frobenius norm, in (0, 1].

    Returns:
      (*batch,) int32, between 1 and k (0 where all values are zero).

    Raises:
      ValueError: `energy` outside (0, 1].

    Example:
      >>> int(rank_for_energy(jnp.array([3.0, 1.0, 0.5]), 0.9))  # 9 of 10.25 is 88 %, 10 of 10.25 is 98 %
      2
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy is a share in (0, 1], got {energy}.")
    s = jnp.sort(jnp.asarray(singular_values), axis=-1, descending=True)
    # Dividing by the largest first keeps the squares of tiny deltas from underflowing.
    top = s[..., :1]
    held = jnp.cumsum(jnp.square(s / jnp.where(top > 0, top, 1)), axis=-1)
    count = 1 + jnp.sum(held < energy * held[..., -1:], axis=-1, dtype=jnp.int32)
    return jnp.where(top[..., 0] > 0, count, 0)
