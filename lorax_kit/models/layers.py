"""Layers that several models share, written for speed where autodiff of the textbook form is slow.

Shapes: B batch, H heads, T tokens, K size of a head.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_kit.arrays.after import after

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


@jax.custom_jvp
def gelu_tanh(x: Float[Array, ...]) -> Float[Array, ...]:
    """The tanh form of the GELU (Hendrycks and Gimpel, arXiv 1606.08415): GPT-2's, Gemma's and T5 v1.1's.

    The derivative is written out, as that of `gelu`.
    """
    return 0.5 * x * (1 + jnp.tanh(_inner(x)))


def _inner(x: Array) -> Array:
    return (2 / math.pi) ** 0.5 * x * (1 + 0.044715 * x * x)


@gelu_tanh.defjvp
def _gelu_tanh_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    t = jnp.tanh(_inner(x))
    slope = (2 / math.pi) ** 0.5 * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + t), dx * 0.5 * (1 + t + x * (1 - t * t) * slope)


in_fp32 = partial(lax.dot_general, preferred_element_type=jnp.float32)
"""A product summed and kept in fp32: rounding the logits of 50,000 words to bf16 would tie the best of them."""


def tied_logits(x: Float[Array, "B T D"], table: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    """Products with every word's embedding, fp32."""
    return in_fp32(x, table.astype(x.dtype), (((2,), (1,)), ((), ())))


def _heads(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    """Batched product over one axis each of (B, H, *, *) arrays."""
    return lax.dot_general(x, y, (((axes[0],), (axes[1],)), ((0, 1), (0, 1))))


def attention(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B H S K"],
    v: Float[Array, "B H S K"],
    seen: Bool[Array, "B 1 #T S"],
    plain: bool = False,
    *,
    bias: Float[Array, "#B H T S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B H T K"]:
    """softmax(scale q k^T + bias) v over the places `seen`, the softmax in fp32; where none is seen, the mean of v.

    Args:
      scale: None: 1 / sqrt(K).
      bias: of the scores (T5's positions), fp32; None: none.

    The derivative is written out (as in FlashAttention, Dao et al., arXiv 2205.14135, appendix B): its products have
    the thin operand first, which XLA's CPU backend runs up to 1.6x faster than what autodiff asks for, and the
    denominator of the softmax divides (T, K) outputs instead of (T, S) weights. The weights are not kept, but formed
    again from q and k. Forward and backward take 0.7x of the time of autodiff (8 x 128 tokens, 12 heads of 32).
    It is a derivative of reverse mode only; `plain` leaves it to autodiff, which has both.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if plain:
        return _attention_fwd(q, k, v, seen, bias, scale)[0]
    try:
        return _attention(q, k, v, seen, bias, scale)
    except TypeError as e:
        if "forward-mode" not in str(e):
            raise
        raise TypeError(
            "attention has a derivative of reverse mode only, and this is forward mode (jvp).\n"
            "  build the model with plain=True, or model.clone(plain=True): autodiff throughout, slower"
        ) from e


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q: Array, k: Array, v: Array, seen: Array, bias: Array | None, scale: float) -> Array:
    return _attention_fwd(q, k, v, seen, bias, scale)[0]


def _raised(q: Array, k: Array, seen: Array, bias: Array | None) -> Float[Array, "B H T S"]:
    """exp(score - the row's largest) in fp32; q is scaled already."""
    scores = _heads(q, k, (3, 3)).astype(jnp.float32)
    scores = jnp.where(seen, scores if bias is None else scores + bias, -1e9)
    # The largest is found again in the backward pass: XLA's schedule needs a fifth more memory where it is kept.
    return jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))


def _attention_fwd(
    q: Array, k: Array, v: Array, seen: Array, bias: Array | None, scale: float
) -> tuple[Array, tuple[Array | None, ...]]:
    q = q * jnp.asarray(scale, q.dtype)
    raised = _raised(q, k, seen, bias)
    share = 1 / jnp.sum(raised, axis=-1, keepdims=True)  # (B, H, T, 1)
    out = (_heads(raised.astype(v.dtype), v, (3, 2)).astype(jnp.float32) * share).astype(v.dtype)
    return out, (q, k, v, seen, bias, share, out)


def _attention_bwd(scale: float, residuals: tuple[Any, ...], g: Array) -> tuple[Array, Array, Array, None, Any]:
    q, k, v, seen, bias, share, out = residuals  # q is scaled already
    raised = _raised(after(g, q), k, seen, bias).astype(v.dtype)
    g = (g.astype(jnp.float32) * share).astype(g.dtype)
    dv = jnp.swapaxes(_heads(g, raised, (2, 2)), 2, 3)
    mean = jnp.sum((g * out).astype(jnp.float32), axis=-1, keepdims=True)
    dscores = raised.astype(jnp.float32) * (_heads(g, v, (3, 3)).astype(jnp.float32) - mean)  # (B, H, T, S)
    dscores = jnp.where(seen, dscores, 0)  # a row that sees nothing has weights, but no gradient
    dbias = None if bias is None else jnp.sum(dscores, axis=0, keepdims=True) if bias.shape[0] == 1 else dscores
    dscores = dscores.astype(q.dtype)
    dq = _heads(dscores, k, (3, 2)) * jnp.asarray(scale, q.dtype)
    dk = jnp.swapaxes(_heads(q, dscores, (2, 2)), 2, 3)
    return dq, dk, dv, None, dbias


_attention.defvjp(_attention_fwd, _attention_bwd)


def first_token(hidden: Float[Array, "B T D"], mask: Array) -> Float[Array, "B D"]:
    """The vector of the first token that counts, fp32."""
    return _token(hidden, jnp.argmax(mask != 0, axis=1))


def last_token(hidden: Float[Array, "B T D"], mask: Array) -> Float[Array, "B D"]:
    """The vector of the last token that counts, fp32."""
    places = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
    return _token(hidden, jnp.max(jnp.where(mask != 0, places, 0), axis=1))


def mean_token(hidden: Float[Array, "B T D"], mask: Array) -> Float[Array, "B D"]:
    """The mean over the tokens that count, fp32."""
    kept = (mask != 0).astype(jnp.float32)[..., None]  # (B, T, 1)
    return jnp.sum(hidden.astype(jnp.float32) * kept, axis=1) / jnp.maximum(jnp.sum(kept, axis=1), 1.0)


def _token(hidden: Float[Array, "B T D"], place: Array) -> Float[Array, "B D"]:
    return jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0].astype(jnp.float32)
