"""DoRA: W' = m * (W + s A^T B) / |W + s A^T B|, norms over the input axes, detached (arXiv 2402.09353, eq. 11).

Symbols: m is `magnitude` (*stack, *out), A is `a` (r, *stack, *in), B is `b` (r, *stack, *out), s is `scale`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.core.errors import AdapterError
from lorax_kit.core.factors import Factors, init_lowrank
from lorax_kit.core.plan import Site
from lorax_kit.core.variant import Variant

if TYPE_CHECKING:
    from jaxtyping import Float


def _matrix(site: Site, w: Array) -> Float[Array, " stack in out"]:
    order = (*site.axes.stack, *site.axes.inputs, *site.axes.outputs)
    return jnp.transpose(w, order).reshape(_flat(site.stack_shape), _flat(site.in_shape), -1)


def _flat(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def norm(site: Site, w: Array, a: Array, b: Array, scale: Array | float) -> Float[Array, ...]:
    """|W + s A^T B| per output, shape (*stack, *out), without forming the sum.

    |W + sAB|^2 = |W|^2 + 2s <B, AW> + s^2 <B, (A A^T) B>: r x out products only. At B = 0 it is |W| to the bit,
    which is what `init` stores, so the multiplier starts at exactly 1.
    """
    with jax.default_matmul_precision("highest"):
        dtype = jnp.promote_types(a.dtype, jnp.float32)
        w3 = _matrix(site, w).astype(dtype)
        a3 = a.astype(dtype).reshape(a.shape[0], w3.shape[0], w3.shape[1])
        b3 = b.astype(dtype).reshape(b.shape[0], w3.shape[0], w3.shape[2])
        scale = jnp.asarray(scale, dtype)
        cross = jnp.einsum("rso,rsi,sio->so", b3, a3, w3, optimize=[(1, 2), (0, 1)])
        gram = jnp.einsum("rsi,qsi->srq", a3, a3)
        square = jnp.sum(w3 * w3, axis=1) + 2 * scale * cross + scale**2 * jnp.einsum("rso,srq,qso->so", b3, gram, b3)
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(dtype).tiny)).reshape(*site.stack_shape, *site.out_shape)


def init(site: Site, w: Array, key: Array) -> Factors:
    """LoRA's factors, and the norms of W as magnitudes."""
    factors = init_lowrank(site, key)
    magnitude = norm(site, w, factors.a, factors.b, site.scale).astype(factors.a.dtype)
    return factors._replace(magnitude=magnitude)


def column_scale(site: Site, w: Array, factors: Factors, scale: Array | float) -> Float[Array, ...]:
    """m / |W + s A^T B|, the norm detached from the gradient (section 4.3 of the paper)."""
    if factors.magnitude is None:
        raise AdapterError(f"the factors at {site.path!r} have no magnitude, which DoRA needs.")
    return factors.magnitude / jax.lax.stop_gradient(norm(site, w, factors.a, factors.b, scale))


DORA = Variant(init=init, column_scale=column_scale)
