"""Rules of lookups: rows of a parameter, chosen by index (embeddings)."""

from __future__ import annotations

from math import prod
from typing import Any

import jax.numpy as jnp
from jax import lax

from lorax_kit.core.plan import Axes
from lorax_kit.transform.cost import Product
from lorax_kit.transform.interpret import Context, bind, rule
from lorax_kit.transform.weight import Weight


@rule("gather")
def gather(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """Rows looked up along the input axis (embeddings): the same rows of A^T, times B."""
    weight, indices = args[0], args[1]
    if not isinstance(weight, Weight):
        return "used as indices"
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    looked = numbers.start_index_map
    whole = all(sizes[d] == weight.w.shape[d] for d in range(weight.w.ndim) if d not in looked)
    if numbers.operand_batching_dims or len(looked) != 1 or numbers.collapsed_slice_dims != looked or not whole:
        return "a gather that is not a lookup of whole rows along one axis"
    axis = weight.axes[looked[0]]
    rest = tuple(i for i in weight.axes if i != axis)
    if weight.site is None:
        if not rest:
            return "a lookup of scalars"
        axes = Axes(inputs=(axis,), outputs=tuple(sorted(rest)), stack=weight.stack)
        ctx.record(weight, eqn, 0, how="lookup", reason="", axes=axes)
        return bind(eqn, [weight.w, indices])
    axes = weight.site.axes
    if weight.stack:
        return "a lookup in a stacked parameter"
    if weight.column is not None and eqn.params["fill_value"] is not None:
        return "rows out of bounds are filled, and magnitudes must not scale what fills them"
    if axes.inputs == (axis,):
        down, up, outs = weight.a, weight.b, axes.outputs
    elif axes.outputs == (axis,):
        down, up, outs = weight.b, weight.a, axes.inputs
    else:
        return f"a lookup along axis {axis}, the plan has inputs {axes.inputs}, outputs {axes.outputs}"
    assert down is not None
    assert up is not None
    out = eqn.outvars[0].aval
    dtype = jnp.dtype(ctx.compute_dtype or weight.w.dtype)
    y = bind(eqn, [weight.w, indices])[0]
    lead = indices.shape[:-1]
    rank, n = down.shape[0], prod(up.shape[1:])
    product = Product(1, prod(lead), down.shape[1], n, rank)
    ctx.record(weight, eqn, 0, how="lookup", reason="only the rows looked up are multiplied", product=product)
    rows = lax.gather(
        jnp.transpose(down).astype(dtype),
        indices,
        lax.GatherDimensionNumbers(offset_dims=(len(lead),), collapsed_slice_dims=(0,), start_index_map=(0,)),
        slice_sizes=(1, rank),
        mode=eqn.params["mode"],
        fill_value=0,  # a row out of bounds has no update; the base's lookup fills it
    )
    update = (jnp.asarray(weight.scale, dtype) * rows.reshape(-1, rank)) @ up.reshape(rank, n).astype(dtype)
    # The slices' axes sit at offset_dims, in the layout of w; the lookup's own axes fill the other places.
    offset = numbers.offset_dims
    names = [("lead", d) for d in range(len(lead))] + list(outs)
    places: list[Any] = [None] * len(out.shape)
    for place, i in zip(offset, rest, strict=True):
        places[place] = i
    free = iter(names[: len(lead)])
    places = [next(free) if p is None else p for p in places]
    sizes_out = tuple(weight.w.shape[weight.axes.index(i)] for i in outs)
    update = jnp.transpose(update.reshape(*lead, *sizes_out), tuple(names.index(p) for p in places))
    y = y + update.astype(y.dtype)
    if weight.column is not None:
        if axes.inputs != (axis,):
            return "a lookup across outputs that have magnitudes of their own"
        column = jnp.transpose(weight.column, tuple(outs.index(i) for i in rest))
        spread = tuple(d for d in range(y.ndim) if d not in offset)
        y = y * jnp.expand_dims(column, spread).astype(y.dtype)
    return [y]
