"""The low-rank product y = x W + s (x A^T) B, in three forms that differ only in cost.

All take x (*S, M, K), w (*S, K, N), a (r, *S, K), b (r, *S, N) with at most one stack axis S, and return
(*S, M, N). The derivative rules write both factor gradients as (thin)^T (wide): XLA's CPU backend runs the
tall, thin `x.T @ g` (1536x1024 by 1024x8) over ten times slower than `g.T @ x`, which is what autodiff of
the textbook form with A (in, r) asks for. No full dW is ever needed; the cotangent of `w` is returned
for those who differentiate the base, and is dead code otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Precision = Any


def _dot(x: Array, y: Array, contract: tuple[int, int], stack: tuple[int, int] | None, precision: Precision) -> Array:
    """dot_general over one contracting axis each, and one stack axis each if there is one."""
    batch = ((), ()) if stack is None else ((stack[0],), (stack[1],))
    return lax.dot_general(x, y, (((contract[0],), (contract[1],)), batch), precision=precision)


def _down(x: Array, a: Array, precision: Precision) -> Array:
    """x A^T: (*S, M, K), (r, *S, K) -> (*S, M, r)."""
    if x.ndim == 2:
        return _dot(x, a, (1, 1), None, precision)
    return _dot(x, a, (2, 2), (0, 1), precision)


def _up(u: Array, b: Array, precision: Precision) -> Array:
    """u B: (*S, M, r), (r, *S, N) -> (*S, M, N)."""
    if u.ndim == 2:
        return _dot(u, b, (1, 0), None, precision)
    return _dot(u, b, (2, 0), (0, 1), precision)


def _factor_gradient(u: Array, x: Array, precision: Precision) -> Array:
    """u^T x in the fast orientation, thin operand first: (*S, M, r), (*S, M, K) -> (r, *S, K)."""
    if u.ndim == 2:
        return _dot(u, x, (0, 0), None, precision)
    return jnp.moveaxis(_dot(u, x, (1, 1), (0, 0), precision), 1, 0)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def lowrank_update(x: Array, a: Array, b: Array, scale: Array, precision: Precision = None) -> Array:
    """s (x A^T) B alone, with its own derivative rule."""
    return _up(scale * _down(x, a, precision), b, precision)


def _update_fwd(x: Array, a: Array, b: Array, scale: Array, precision: Precision) -> tuple[Array, tuple]:
    u = _down(x, a, precision)
    return _up(scale * u, b, precision), (x, a, b, scale, u)


def _factor_cotangents(x: Array, u: Array, h: Array, g: Array, scale: Array, precision: Precision) -> tuple:
    """(da, db, ds) from u = x A^T and h = g B^T."""
    da = _factor_gradient(scale * h, x, precision)
    db = _factor_gradient(scale * u, g, precision)
    return da, db, jnp.sum(h * u).astype(scale.dtype)


def _update_bwd(precision: Precision, residuals: tuple, g: Array) -> tuple:
    x, a, b, scale, u = residuals
    h = _down(g, b, precision)
    da, db, ds = _factor_cotangents(x, u, h, g, scale, precision)
    return _up(scale * h, a, precision), da, db, ds


lowrank_update.defvjp(_update_fwd, _update_bwd)


def _matmul(x: Array, w: Array, precision: Precision) -> Array:
    if x.ndim == 2:
        return _dot(x, w, (1, 0), None, precision)
    return _dot(x, w, (2, 1), (0, 0), precision)


def factored(x: Array, w: Array, a: Array, b: Array, scale: Array, precision: Precision = None) -> Array:
    """The base product plus the low-rank one: cheapest for few tokens, or a base shared by stacked trials."""
    return _matmul(x, w, precision) + lowrank_update(x, a, b, scale, precision)


def plain(x: Array, w: Array, a: Array, b: Array, scale: Array, precision: Precision = None) -> Array:
    """`factored` without a derivative rule of its own: slower, but also differentiable in forward mode."""
    return _matmul(x, w, precision) + _up(scale * _down(x, a, precision), b, precision)


def _merged_weight(w: Array, a: Array, b: Array, scale: Array, precision: Precision) -> Array:
    if w.ndim == 2:
        return w + _dot(scale * a, b, (0, 0), None, precision)
    return w + _dot(scale * a, b, (0, 0), (1, 1), precision)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def merged(x: Array, w: Array, a: Array, b: Array, scale: Array, precision: Precision = None) -> Array:
    """x (W + s A^T B): the sum lives only for one product, and is formed again in the backward pass.

    Cheapest for many tokens: it saves the two thin products and the additions over the activations.
    """
    return _matmul(x, _merged_weight(w, a, b, scale, precision), precision)


def _merged_fwd(x: Array, w: Array, a: Array, b: Array, scale: Array, precision: Precision) -> tuple[Array, tuple]:
    return merged(x, w, a, b, scale, precision), (x, w, a, b, scale)


def _merged_bwd(precision: Precision, residuals: tuple, g: Array) -> tuple:
    x, w, a, b, scale = residuals
    # The barrier keeps XLA from reusing the forward pass's sum, and so from keeping it alive in between.
    a, g = lax.optimization_barrier((a, g))
    full = _merged_weight(w, a, b, scale, precision)
    dx = _dot(g, full, (1, 1), None, precision) if g.ndim == 2 else _dot(g, full, (2, 2), (0, 0), precision)
    h, u = _down(g, b, precision), _down(x, a, precision)
    da, db, ds = _factor_cotangents(x, u, h, g, scale, precision)
    dw = _dot(x, g, (0, 0), None, precision) if g.ndim == 2 else _dot(x, g, (1, 1), (0, 0), precision)
    return dx, dw, da, db, ds


merged.defvjp(_merged_fwd, _merged_bwd)

Kernel = Callable[[Array, Array, Array, Array, Array, Precision], Array]
KERNELS: dict[str, Kernel] = {"factored": factored, "merged": merged, "plain": plain}
