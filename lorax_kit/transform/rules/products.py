"""Rule of products: dot_general, the parameter on either side, contracted over all its inputs or outputs."""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_kit.core.plan import Axes
from lorax_kit.transform.cost import Product
from lorax_kit.transform.interpret import Context, bind, rule
from lorax_kit.transform.kernels import KERNELS, lowrank_update
from lorax_kit.transform.weight import Weight


def _sizes(shape: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[d] for d in dims)


def _drop(x: Array, key: Array | None, rate: float) -> Array:
    """Inverted dropout on the input of the low-rank path; no key means evaluation."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


@rule("dot_general")
def dot_general(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """x W' with any dimension numbers, W' on either side, contracted over all inputs or all outputs."""
    if all(isinstance(v, Weight) for v in args):
        return "multiplied with another adapted parameter"
    weight_is = 0 if isinstance(args[0], Weight) else 1
    weight, x = args[weight_is], args[1 - weight_is]
    contracting, batch = eqn.params["dimension_numbers"]
    w_contract, x_contract = contracting[weight_is], contracting[1 - weight_is]
    w_batch, x_batch = batch[weight_is], batch[1 - weight_is]
    w_free = tuple(d for d in range(weight.w.ndim) if d not in (*w_contract, *w_batch))
    x_free = tuple(d for d in range(x.ndim) if d not in (*x_contract, *x_batch))
    contracted, stacked, free = (tuple(weight.axes[d] for d in ds) for ds in (w_contract, w_batch, w_free))

    if weight.site is None:
        if not contracted or not free:
            return "an outer or inner product leaves no input or no output axes"
        stack = tuple(sorted((*weight.stack, *stacked)))
        axes = Axes(inputs=tuple(sorted(contracted)), outputs=tuple(sorted(free)), stack=stack)
        ctx.record(weight, eqn, weight_is, how="factored", reason="", axes=axes)
        values = list(args)
        values[weight_is] = weight.w
        return bind(eqn, values)

    axes = weight.site.axes
    if set(stacked) != set(weight.stack):
        return f"batched over axes {stacked}, the plan stacks {weight.stack}"
    if set(contracted) == set(axes.inputs):
        transposed, ins, outs, down, up = False, axes.inputs, axes.outputs, weight.a, weight.b
    elif set(contracted) == set(axes.outputs):
        transposed, ins, outs, down, up = True, axes.outputs, axes.inputs, weight.b, weight.a
    else:
        return f"contracted over axes {contracted}, the plan has inputs {axes.inputs}, outputs {axes.outputs}"
    assert down is not None
    assert up is not None

    # To matrices: x (*S, M, K), w (*S, K, N), factors (r, *S, K) and (r, *S, N). For kernels in the usual
    # layout every transpose is the identity and every reshape free.
    x_of = dict(zip(contracted, x_contract, strict=True)) | dict(zip(stacked, x_batch, strict=True))
    stack_sizes = tuple(weight.w.shape[weight.axes.index(i)] for i in weight.stack)
    s, m = prod(stack_sizes), prod(_sizes(x.shape, x_free))
    k, n = (prod(weight.w.shape[weight.axes.index(i)] for i in part) for part in (ins, outs))
    rank = down.shape[0]
    lead = () if not weight.stack else (s,)
    x3 = jnp.transpose(x, (*(x_of[i] for i in weight.stack), *x_free, *(x_of[i] for i in ins))).reshape(*lead, m, k)
    order = (*weight.stack, *ins, *outs)
    w3 = jnp.transpose(weight.w, tuple(weight.axes.index(i) for i in order)).reshape(*lead, k, n)
    down3, up3 = down.reshape(rank, *lead, k), up.reshape(rank, *lead, n)

    out_dtype = eqn.outvars[0].aval.dtype
    dtype = jnp.dtype(ctx.compute_dtype or jnp.promote_types(x.dtype, weight.w.dtype))
    column = None if weight.column is None else weight.column.reshape(*lead, 1, -1).astype(dtype)
    if column is not None and transposed:
        x3 = x3 * column.astype(x3.dtype)
    product = Product(s, m, k, n, rank)
    how, why = ctx.select(product)
    dropout = weight.site.setting.dropout if weight.key is not None else 0.0
    one_dtype = dtype == x.dtype == weight.w.dtype == out_dtype
    if how == "merged" and dropout:
        how, why = "factored", "dropout acts on the input of the low-rank path only"
    elif how == "merged" and (not one_dtype or jnp.finfo(dtype).bits < 32):
        how, why = "factored", f"a sum in {weight.w.dtype} would round small updates away"
    ctx.record(weight, eqn, weight_is, how=how, reason=why, product=product)

    precision = eqn.params["precision"]
    scale = jnp.asarray(weight.scale, dtype)
    down3, up3 = down3.astype(dtype), up3.astype(dtype)
    if one_dtype and not dropout:
        y = KERNELS[how](x3, w3, down3, up3, scale, precision)
    else:
        dims = (((x3.ndim - 1,), (w3.ndim - 2,)), ((0,), (0,)) if lead else ((), ()))
        y = lax.dot_general(x3, w3, dims, precision=precision, preferred_element_type=out_dtype)
        dropped = _drop(x3.astype(dtype), weight.key, dropout)
        if how == "plain":
            update = KERNELS["plain"](dropped, jnp.zeros_like(w3, dtype), down3, up3, scale, precision)
        else:
            update = lowrank_update(dropped, down3, up3, scale, precision)
        y = y + update.astype(out_dtype)
    if column is not None and not transposed:
        y = y * column.astype(y.dtype)

    # Back to dot_general's order: batch, then the free axes of the left and of the right operand.
    y = y.reshape(*stack_sizes, *_sizes(x.shape, x_free), *(weight.w.shape[weight.axes.index(i)] for i in outs))
    names = [*weight.stack, *(("x", d) for d in x_free), *outs]
    mine, theirs = list(free), [("x", d) for d in x_free]
    target = [*stacked, *(mine + theirs if weight_is == 0 else theirs + mine)]
    return [jnp.transpose(y, tuple(names.index(t) for t in target))]
