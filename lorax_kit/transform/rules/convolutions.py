"""Rule of convolutions: to r channels with one factor, then a 1x1 to the outputs with the other."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import Partial

from lorax_kit.transform.context import Context
from lorax_kit.transform.cost import Product
from lorax_kit.transform.interpreter.bind import bind
from lorax_kit.transform.interpreter.registry import rule
from lorax_kit.transform.weight import Parameter, Probe, Weight, multiplied


@rule("conv_general_dilated")
def conv_general_dilated(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """Any number of dimensions, strides, dilations, paddings, layouts and feature groups.

    With G feature groups, all groups share the factor that reads their inputs: its kernel is repeated G times, and
    each group's r channels feed that group's outputs.
    """
    x, weight = args
    p = eqn.params
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    if not isinstance(weight, Parameter) or isinstance(x, Parameter):
        return "the input of a convolution"
    out, *ins = numbers.rhs_spec
    if isinstance(weight, Probe):
        own = tuple(sorted(ins, key=lambda d: weight.parts[0].dims[d]))
        patches = Partial(partial(_patches, shape=weight.shape, own=own, params=dict(p)))
        return ctx.probed(eqn, args, 1, (own, (out,), ()), patches if p["batch_group_count"] == 1 else None)
    assert isinstance(weight, Weight)
    if p["batch_group_count"] != 1:
        return "a convolution with batch groups"
    sides = weight.sides(ins, (out,))
    if sides is None:
        return "a convolution over other axes than the plan's inputs"
    down, up = sides
    gain = weight.gain
    if gain is not None and weight.owned(gain, 0) - {out}:
        return "magnitudes vary along the inputs of a convolution"
    dtype = ctx.update_dtype(x, weight.base)
    rank, outputs = down.shape[0], weight.shape[out]
    kernel = _repeated(jnp.moveaxis(jnp.squeeze(down, 1 + out), 0, out).astype(dtype), groups, out)
    u = lax.conv_general_dilated(
        weight.dropped(x.astype(dtype)),
        kernel,
        p["window_strides"],
        p["padding"],
        p["lhs_dilation"],
        p["rhs_dilation"],
        numbers,
        groups,
        precision=p["precision"],
    )
    channel = numbers.out_spec[1]
    u = jnp.moveaxis(u, channel, -1)
    u = u.reshape(*u.shape[:-1], groups, rank) * jnp.asarray(weight.scale, dtype)
    update = jnp.einsum(
        "...gr,rgo->...go", u, up.reshape(rank, groups, outputs // groups).astype(dtype), precision=p["precision"]
    )
    update = jnp.moveaxis(update.reshape(*update.shape[:-2], outputs), -1, channel)
    y = weight.base.dot(Partial(lambda w, x: bind(eqn, [x, w])[0]), x, ctx.kernel)
    places = prod(y.shape) // outputs
    product = Product(1, places, prod(weight.shape) // outputs, outputs, rank)
    ctx.record(weight, eqn, 1, how="factored", reason=f"a convolution to {rank} channels, then 1x1", product=product)
    y = y + update.astype(y.dtype)
    if gain is not None:
        shape = [1] * y.ndim
        shape[channel] = outputs
        whole = jnp.broadcast_to(gain, [n if d == out else 1 for d, n in enumerate(weight.shape)])
        y = multiplied(y, whole.reshape(shape))
    return [y]


def _repeated(kernel: Array, groups: int, axis: int) -> Array:
    """One copy per group along an axis. A concatenation of the copies would have a slice for each in its derivative."""
    if groups == 1:
        return kernel
    shape, size = list(kernel.shape), kernel.shape[axis]
    spread = lax.broadcast_in_dim(
        kernel, (*shape[:axis], groups, *shape[axis:]), tuple(d + (d >= axis) for d in range(kernel.ndim))
    )
    return spread.reshape(*shape[:axis], groups * size, *shape[axis + 1 :])


def _patches(x: Array, shape: tuple[int, ...], own: tuple[int, ...], params: dict[str, Any]) -> Array:
    """What each place of the output reads, (places x groups, inputs), the kernel's inputs in the order `own`."""
    numbers = params["dimension_numbers"]
    _, channel, *spatial = numbers.rhs_spec
    patches = lax.conv_general_dilated_patches(
        x,
        tuple(shape[d] for d in spatial),
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        numbers,
    )
    patches = jnp.moveaxis(patches, numbers.out_spec[1], -1)  # channels first, then places of the window
    patches = patches.reshape(-1, *(shape[d] for d in (channel, *spatial)))
    order = [(channel, *spatial).index(d) for d in own]
    return jnp.transpose(patches, (0, *(1 + i for i in order))).reshape(patches.shape[0], -1)
