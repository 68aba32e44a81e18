"""The low-rank products y_i = x W_i + s_i (x A_i^T) B_i of one x with one or more sites, in forms that differ in cost.

All take x (*S, M, K) and operands with w (*S, K, N_i), a (r_i, *S, K), b (r_i, *S, N_i), at most one stack axis S, and
return one (*S, M, N_i) per operand. Sites that read the same x (q, k and v) share one thin product with all their A,
and one wide one with all their W. The derivative rules write both factor gradients as (thin)^T (wide): XLA's CPU
backend runs the tall, thin `x.T @ g` (1536x1024 by 1024x8) over ten times slower than `g.T @ x`, what autodiff of
the textbook form with A (in, r) asks for. No full dW is ever needed; the cotangent of `w` is returned for those who
differentiate the base, and is dead code otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_kit.arrays.after import after

Precision = Any


class Operand(NamedTuple):
    """One site.

    Attributes:
      w: (*S, K, N).
      a, b: (r, *S, K), (r, *S, N).
      scale: ().
    """

    w: Array
    a: Array
    b: Array
    scale: Array


Operands = tuple[Operand, ...]
Outputs = tuple[Array, ...]


def _dot(x: Array, y: Array, contract: tuple[int, int], stack: tuple[int, int] | None, precision: Precision) -> Array:
    """dot_general over one contracting axis each, and one stack axis each if there is one."""
    batch = ((), ()) if stack is None else ((stack[0],), (stack[1],))
    return lax.dot_general(x, y, (((contract[0],), (contract[1],)), batch), precision=precision)


def _matmul(x: Array, w: Array, precision: Precision) -> Array:
    """x W: (*S, M, K), (*S, K, N) -> (*S, M, N)."""
    return _dot(x, w, (1, 0), None, precision) if x.ndim == 2 else _dot(x, w, (2, 1), (0, 0), precision)


def _matmul_back(g: Array, w: Array, precision: Precision) -> Array:
    """g W^T: (*S, M, N), (*S, K, N) -> (*S, M, K)."""
    return _dot(g, w, (1, 1), None, precision) if g.ndim == 2 else _dot(g, w, (2, 2), (0, 0), precision)


def _down(x: Array, a: Array, precision: Precision) -> Array:
    """x A^T: (*S, M, K), (r, *S, K) -> (*S, M, r)."""
    return _dot(x, a, (1, 1), None, precision) if x.ndim == 2 else _dot(x, a, (2, 2), (0, 1), precision)


def _up(u: Array, b: Array, precision: Precision) -> Array:
    """u B: (*S, M, r), (r, *S, N) -> (*S, M, N)."""
    return _dot(u, b, (1, 0), None, precision) if u.ndim == 2 else _dot(u, b, (2, 0), (0, 1), precision)


def _factor_gradient(u: Array, x: Array, precision: Precision) -> Array:
    """u^T x in the fast orientation, thin operand first: (*S, M, r), (*S, M, K) -> (r, *S, K)."""
    if u.ndim == 2:
        return _dot(u, x, (0, 0), None, precision)
    return jnp.moveaxis(_dot(u, x, (1, 1), (0, 0), precision), 1, 0)


def _joined(arrays: Sequence[Array], axis: int) -> Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)


def _parted(x: Array, sizes: Sequence[int], axis: int) -> list[Array]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return jnp.split(x, ends, axis) if ends else [x]


def _ranks(sites: Operands) -> list[int]:
    return [site.a.shape[0] for site in sites]


def _downs(x: Array, sites: Operands, precision: Precision) -> list[Array]:
    """x A_i^T of each site, by one product."""
    return _parted(_down(x, _joined([site.a for site in sites], 0), precision), _ranks(sites), -1)


def _factor_cotangents(
    x: Array, sites: Operands, us: list[Array], hs: list[Array], gs: Outputs, precision: Any
) -> list:
    """(da, db, ds) of each site, from u = x A^T and h = g B^T."""
    scaled = _joined([_scaled(h, site.scale) for site, h in zip(sites, hs, strict=True)], -1)
    das = _parted(_factor_gradient(scaled, x, precision), _ranks(sites), 0)
    dbs = [_factor_gradient(_scaled(u, site.scale), g, precision) for site, u, g in zip(sites, us, gs, strict=True)]
    every = tuple(range(us[0].ndim))
    dss = [lax.dot_general(h, u, ((every, every), ((), ())), precision=precision) for h, u in zip(hs, us, strict=True)]
    return list(zip(das, dbs, dss, strict=True))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def lowrank_updates(x: Array, sites: Operands, precision: Precision = None) -> Outputs:
    """s_i (x A_i^T) B_i alone, with its own derivative rule; `w` is not read, give an empty one."""
    return _updates_fwd(x, sites, precision)[0]


def _updates_fwd(x: Array, sites: Operands, precision: Precision) -> tuple[Outputs, tuple]:
    us = _downs(x, sites, precision)
    ys = tuple(_up(_scaled(u, site.scale), site.b, precision) for site, u in zip(sites, us, strict=True))
    return ys, (x, sites, us)


def _updates_bwd(precision: Precision, residuals: tuple, gs: Outputs) -> tuple:
    x, sites, us = residuals
    dx, cotangents = _update_cotangents(x, sites, us, gs, precision)
    return dx, tuple(Operand(jnp.zeros_like(site.w), *d) for site, d in zip(sites, cotangents, strict=True))


def _update_cotangents(x: Array, sites: Operands, us: list[Array], gs: Outputs, precision: Any) -> tuple[Array, list]:
    hs = [_down(g, site.b, precision) for site, g in zip(sites, gs, strict=True)]
    scaled = _joined([_scaled(h, site.scale) for site, h in zip(sites, hs, strict=True)], -1)
    dx = _up(scaled, _joined([site.a for site in sites], 0), precision)
    return dx, _factor_cotangents(x, sites, us, hs, gs, precision)


lowrank_updates.defvjp(_updates_fwd, _updates_bwd)


def _base(x: Array, sites: Operands, precision: Precision) -> list[Array]:
    sizes = [site.w.shape[-1] for site in sites]
    return _parted(_matmul(x, _joined([site.w for site in sites], -1), precision), sizes, -1)


def _bare(sites: Operands) -> Operands:
    """Without `w`, of which an update needs nothing."""
    return tuple(site._replace(w=jnp.zeros((0,), site.w.dtype)) for site in sites)


def factored(x: Array, sites: Operands, precision: Precision = None) -> Outputs:
    """The base product plus the low-rank ones: cheapest for few tokens, or a base shared by stacked trials."""
    updates = lowrank_updates(x, _bare(sites), precision)
    return tuple(y + update for y, update in zip(_base(x, sites, precision), updates, strict=True))


def plain_updates(x: Array, sites: Operands, precision: Precision = None) -> Outputs:
    """`lowrank_updates` under autodiff."""
    return tuple(_up(site.scale * _down(x, site.a, precision), site.b, precision) for site in sites)


def plain(x: Array, sites: Operands, precision: Precision = None) -> Outputs:
    """`factored` without a derivative rule of its own: slower, but also differentiable in forward mode."""
    updates = plain_updates(x, sites, precision)
    return tuple(y + update for y, update in zip(_base(x, sites, precision), updates, strict=True))


def _scaled(x: Array, scale: Array) -> Array:
    """scale * x; `lax`, because each operator of jax.numpy is a jit of its own to trace."""
    return lax.mul(x, lax.broadcast(scale, x.shape))


def _summed(sites: Operands, precision: Precision) -> Array:
    """W_i + s_i A_i^T B_i, side by side: (*S, K, sum N)."""
    stack = None if sites[0].w.ndim == 2 else (1, 1)
    return _joined([site.w + _dot(_scaled(site.a, site.scale), site.b, (0, 0), stack, precision) for site in sites], -1)


def _waiting(sites: Operands, x: Array) -> Operands:
    """Sites whose sums are formed when `x` is there."""
    return tuple(site._replace(scale=after(x, site.scale)) for site in sites)


def _merged_product(x: Array, sites: Operands, precision: Precision) -> Outputs:
    sizes = [site.w.shape[-1] for site in sites]
    return tuple(_parted(_matmul(x, _summed(sites, precision), precision), sizes, -1))


def _merged_waiting(x: Array, sites: Operands, precision: Precision) -> Outputs:
    return _merged_product(x, _waiting(sites, x), precision)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def merged(x: Array, sites: Operands, precision: Precision = None) -> Outputs:
    """x (W + s A^T B): the sum lives only for one product, and is formed again in the backward pass.

    Cheapest for many tokens: it saves the two thin products and the additions over the activations.
    """
    return _merged_waiting(x, sites, precision)


def _merged_fwd(x: Array, sites: Operands, precision: Precision) -> tuple[Outputs, tuple]:
    # Not delayed in the forward pass: these sums are freed long before activations peak, and reading x here would stop
    # XLA from fusing its producer (5 % of a step at 384 wide).
    # u is kept, r numbers a token: where no gradient of A is asked for, nothing in the backward pass reads x.
    return _merged_product(x, sites, precision), (x, sites, _downs(x, sites, precision))


def _merged_bwd(precision: Precision, residuals: tuple, gs: Outputs) -> tuple:
    x, sites, us = residuals
    hs = [_down(g, site.b, precision) for site, g in zip(sites, gs, strict=True)]
    dx = _matmul_back(_joined(gs, -1), _summed(_waiting(sites, hs[0]), precision), precision)
    cotangents = _factor_cotangents(x, sites, us, hs, gs, precision)
    return dx, _with_base(x, cotangents, gs, precision)


merged.defvjp(_merged_fwd, _merged_bwd)


def _with_base(x: Array, cotangents: list, gs: Outputs, precision: Precision) -> Operands:
    """The cotangents of whole sites: dead code, unless somebody differentiates the base."""
    dws = [_dot(x, g, (0, 0), None, precision) if g.ndim == 2 else _dot(x, g, (1, 1), (0, 0), precision) for g in gs]
    return tuple(Operand(dw, *d) for dw, d in zip(dws, cotangents, strict=True))


def _factored_fwd(x: Array, sites: Operands, precision: Precision) -> tuple[Outputs, tuple]:
    updates, (_, _, us) = _updates_fwd(x, sites, precision)
    ys = tuple(y + update for y, update in zip(_base(x, sites, precision), updates, strict=True))
    return ys, (x, sites, us)


def _factored_bwd(precision: Precision, residuals: tuple, gs: Outputs) -> tuple:
    x, sites, us = residuals
    dx, cotangents = _update_cotangents(x, sites, us, gs, precision)
    base = _matmul_back(_joined(gs, -1), _joined([site.w for site in sites], -1), precision)
    return base + dx, _with_base(x, cotangents, gs, precision)


class Kernel(NamedTuple):
    """One form.

    Attributes:
      run: (x, sites, precision) -> outputs, differentiable.
      infer: the same where nobody differentiates, and quicker to trace.
      forward, backward: the two halves of its derivative rule, for `recompute`, which keeps the outputs and the third
        residual but not x; None where it has no rule.
    """

    run: Callable[[Array, Operands, Precision], Outputs]
    infer: Callable[[Array, Operands, Precision], Outputs]
    forward: Callable[[Array, Operands, Precision], tuple[Outputs, tuple]] | None
    backward: Callable[[Precision, tuple, Outputs], tuple] | None


KERNELS: dict[str, Kernel] = {
    "factored": Kernel(factored, lambda *args: _factored_fwd(*args)[0], _factored_fwd, _factored_bwd),
    "merged": Kernel(merged, _merged_waiting, _merged_fwd, _merged_bwd),
    "plain": Kernel(plain, plain, None, None),
}
