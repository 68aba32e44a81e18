"""Rules of lookups: entries of a parameter chosen by index (embeddings, experts)."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import Partial

from lorax_kit.core.quantised import Quantised
from lorax_kit.transform.context import Context
from lorax_kit.transform.cost import Product
from lorax_kit.transform.interpret import bind, rule
from lorax_kit.transform.weight import Weight


@rule("gather", keeps=True)
def gather(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """Whole slices looked up along one axis.

    Rows of an embedding: the same rows of the factor that varies along that axis, times the other. Matrices of a
    stack (experts): the result is a weight again.
    """
    weight, indices = args
    if not isinstance(weight, Weight) or isinstance(indices, Weight):
        return "used as indices"
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    looked = numbers.start_index_map
    whole = all(sizes[d] == n for d, n in enumerate(weight.shape) if d not in looked)
    if numbers.operand_batching_dims or len(looked) != 1 or numbers.collapsed_slice_dims != looked or not whole:
        return "a gather that is not a lookup of whole slices along one axis"
    (axis,) = looked
    rest = tuple(d for d in range(weight.w.ndim) if d != axis)
    if not rest:
        return "a lookup of scalars"
    matrices = len(rest) > 1 and sum(weight.shape[d] > 1 for d in rest) > 1
    if weight.probe:
        if not matrices:
            ctx.record(weight, eqn, 0, how="lookup", dims=((axis,), rest))
            (y,) = bind(eqn, [weight.w, indices])
            if ctx.tap is not None:
                looked_up = Partial(lambda indices, _: indices.reshape(-1), indices)
                y = ctx.tap(weight, ((axis,), rest, ()), y, looked_up)
            return [y]
        parts = tuple(p._replace(looked=(*p.looked, *p.dims[axis])) for p in weight.parts)
        return [_looked_up(eqn, replace(weight, parts=parts), indices, axis)]
    if weight.column is not None and eqn.params["fill_value"] is not None:
        return "entries out of bounds are filled, and magnitudes must not scale what fills them"
    a, b = weight.factors()
    along = [axis in weight.owned(f) for f in (a, b)]
    if along == [True, True] or (matrices and weight.shape[axis] == 1):
        return [_looked_up(eqn, weight, indices, axis)]
    if along == [False, False] and weight.shape[axis] > 1:
        return "a lookup along an axis it was broadcast to"
    down, up = (a, b) if along[0] else (b, a)
    product = Product(
        1, prod(indices.shape[:-1]), weight.shape[axis], prod(weight.shape) // weight.shape[axis], a.shape[0]
    )
    if weight.owned(down) != {axis} or weight.owned(up) & {axis}:
        reason = "a lookup along one of several inputs"
    else:
        reason = "only the rows looked up are multiplied"
    ctx.record(weight, eqn, 0, how="lookup", reason=reason, product=product)
    dtype = ctx.update_dtype(weight.w)

    def rows(weight: Weight, indices: Array) -> Array:
        found = _looked_up(eqn, weight, indices, axis)
        y = found.base() + found.update(dtype).astype(found.w.dtype)
        return y if found.column is None else y * found.column.astype(y.dtype)

    return [ctx.kept(rows, weight, indices)]


def _looked_up(eqn: Any, weight: Weight, indices: Array, axis: int) -> Weight:
    """The weight of the looked-up slices. The indices' own axes fill the places that `offset_dims` leaves."""
    numbers, p = eqn.params["dimension_numbers"], eqn.params
    out_ndim = len(eqn.outvars[0].aval.shape)
    offset = numbers.offset_dims
    lead_places = tuple(d for d in range(out_ndim) if d not in offset)

    def change(x: Array, lead: int) -> Array:
        if x.shape[lead + axis] == 1 and weight.shape[axis] > 1:
            # The same for all indices: only new axes of size 1.
            x = jnp.squeeze(x, lead + axis)
            return jnp.expand_dims(x, tuple(lead + d for d in lead_places))
        taken = lax.gather(
            x,
            indices,
            lax.GatherDimensionNumbers(
                offset_dims=(*range(lead), *(lead + d for d in offset)),
                collapsed_slice_dims=(lead + axis,),
                start_index_map=(lead + axis,),
            ),
            slice_sizes=(*x.shape[:lead], *(1 if d == axis else x.shape[lead + d] for d in range(weight.w.ndim))),
            mode=p["mode"],
            fill_value=0,  # an entry out of bounds has no update; the base's lookup fills it
        )
        return taken

    def dims(held: Any) -> tuple[Any, ...]:
        kept = iter(x for d, x in enumerate(held) if d != axis)
        return tuple(next(kept) if d in offset else () for d in range(out_ndim))

    return weight.mapped(_entries(eqn, weight, indices, axis), change, dims)


def _entries(eqn: Any, weight: Weight, indices: Array, axis: int) -> Partial:
    """The lookup in the base; in a quantised table only the rows looked up are restored."""
    whole = Partial(lambda indices, w: bind(eqn, [w, indices])[0], indices)
    if weight.empty:

        def zeros(indices: Array, w: Array) -> Array:
            """By a table of one column: what is filled where indices are out of bounds, without one of zeros."""
            thin = tuple(n if d == axis else 1 for d, n in enumerate(w.shape))
            y = lax.gather(
                lax.slice(w, (0,) * w.ndim, thin), indices, eqn.params["dimension_numbers"], (1,) * w.ndim,
                mode=eqn.params["mode"], fill_value=eqn.params["fill_value"],
            )  # fmt: skip
            return jnp.broadcast_to(y, eqn.outvars[0].aval.shape)

        return Partial(zeros, indices)
    source = weight.source
    if source is None or source.steps or axis != 0 or weight.w.ndim != 2 or indices.shape[-1] != 1:
        return whole
    table, fill = source.quantised, eqn.params["fill_value"]

    def rows(table: Quantised, indices: Array, _: Array) -> Array:
        at = indices[..., 0]
        inside = (at >= 0) & (at < table.shape[0])
        found = table.rows(at)
        if eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
            found = jnp.where(inside[..., None], found, jnp.nan if fill is None else fill)
        return found

    plain = eqn.params["dimension_numbers"].offset_dims == (indices.ndim - 1,)
    return Partial(rows, table, indices) if plain else whole
