"""Layers that several models share, written for speed where autodiff of the textbook form is slow.

Shapes: B batch, H heads, T tokens, K size of a head.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_kit.after import after

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@jax.custom_jvp
def gelu(x: Float[Array, ...]) -> Float[Array, ...]:
    """x Phi(x), the exact (erf) GELU of BERT.

    The derivative Phi(x) + x phi(x) is written out: autodiff of the erf form keeps three arrays of the
    feed-forward's size for the backward pass, this rule one.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * (0.5**0.5)))


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    cdf = 0.5 * (1 + jax.lax.erf(x * (0.5**0.5)))
    pdf = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return x * cdf, dx * (cdf + x * pdf)


def _heads(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    """Batched product over one axis each of (B, H, *, *) arrays."""
    return lax.dot_general(x, y, (((axes[0],), (axes[1],)), ((0, 1), (0, 1))))


def attention(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B H S K"],
    v: Float[Array, "B H S K"],
    seen: Bool[Array, "B 1 #T S"],
    plain: bool = False,
) -> Float[Array, "B H T K"]:
    """softmax(q k^T / sqrt(K)) v over the places `seen`, the softmax in fp32; where none is seen, the mean of v.

    The derivative is written out (as in FlashAttention, Dao et al., arXiv 2205.14135, appendix B): its products have
    the thin operand first, which XLA's CPU backend runs up to 1.6x faster than what autodiff asks for, and the
    denominator of the softmax divides (T, K) outputs instead of (T, S) weights. The weights are not kept, but formed
    again from q and k. Forward and backward take 0.7x of the time of autodiff (8 x 128 tokens, 12 heads of 32).
    It is a derivative of reverse mode only; `plain` leaves it to autodiff, which has both.
    """
    if plain:
        return _attention_fwd(q, k, v, seen)[0]
    try:
        return _attention(q, k, v, seen)
    except TypeError as e:
        if "forward-mode" not in str(e):
            raise
        raise TypeError(
            "attention has a derivative of reverse mode only, and this is forward mode (jvp).\n"
            "  build the model with plain=True, or model.clone(plain=True): autodiff throughout, slower"
        ) from e


@jax.custom_vjp
def _attention(q: Array, k: Array, v: Array, seen: Array) -> Array:
    return _attention_fwd(q, k, v, seen)[0]


def _raised(q: Array, k: Array, seen: Array) -> Float[Array, "B H T S"]:
    """exp(score - the row's largest) in fp32; q is scaled already."""
    scores = jnp.where(seen, _heads(q, k, (3, 3)).astype(jnp.float32), -1e9)
    # The largest is found again in the backward pass: XLA's schedule needs a fifth more memory where it is kept.
    return jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))


def _attention_fwd(q: Array, k: Array, v: Array, seen: Array) -> tuple[Array, tuple[Array, ...]]:
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    raised = _raised(q, k, seen)
    share = 1 / jnp.sum(raised, axis=-1, keepdims=True)  # (B, H, T, 1)
    out = (_heads(raised.astype(v.dtype), v, (3, 2)).astype(jnp.float32) * share).astype(v.dtype)
    return out, (q, k, v, seen, share, out)


def _attention_bwd(residuals: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, seen, share, out = residuals  # q is scaled already
    raised = _raised(after(g, q), k, seen).astype(v.dtype)
    g = (g.astype(jnp.float32) * share).astype(g.dtype)
    dv = jnp.swapaxes(_heads(g, raised, (2, 2)), 2, 3)
    mean = jnp.sum((g * out).astype(jnp.float32), axis=-1, keepdims=True)
    dscores = raised.astype(jnp.float32) * (_heads(g, v, (3, 3)).astype(jnp.float32) - mean)  # (B, H, T, S)
    dscores = jnp.where(seen, dscores, 0).astype(q.dtype)  # a row that sees nothing has weights, but no gradient
    dq = _heads(dscores, k, (3, 2)) * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    dk = jnp.swapaxes(_heads(q, dscores, (2, 2)), 2, 3)
    return dq, dk, dv, None


_attention.defvjp(_attention_fwd, _attention_bwd)
