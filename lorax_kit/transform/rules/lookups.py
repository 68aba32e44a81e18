"""Rules of lookups: entries of a parameter chosen by index (embeddings, experts)."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import Partial

from lorax_kit.core.quantised import Quantised
from lorax_kit.transform.context import Context
from lorax_kit.transform.cost import Product
from lorax_kit.transform.interpreter.bind import bind
from lorax_kit.transform.interpreter.registry import rule
from lorax_kit.transform.weight import Weight, multiplied


class Lookup(NamedTuple):
    """A gather of whole slices along one axis of the weight.

    Attributes:
      axis: the weight's.
      indices: (*, 1) int, places along it.
      offset: where the other axes lie in the output, once `kept` is dropped.
      ndim: dimensions of that output.
      kept: the output's axis of size 1 that is left of the looked-up one (a `vmap` of `dynamic_slice` leaves it).
    """

    axis: int
    indices: Array
    offset: tuple[int, ...]
    ndim: int
    kept: int | None = None


def _lookup(eqn: Any, shape: tuple[int, ...], indices: Array) -> Lookup | None:
    """What a gather looks up; None if it is anything but whole slices along one axis."""
    p = eqn.params
    numbers, sizes, ndim = p["dimension_numbers"], p["slice_sizes"], len(eqn.outvars[0].aval.shape)
    offset, looked = tuple(map(int, numbers.offset_dims)), tuple(map(int, numbers.start_index_map))
    if numbers.operand_batching_dims:
        return None
    if len(looked) == 1 and numbers.collapsed_slice_dims == numbers.start_index_map:
        whole = all(sizes[d] == n for d, n in enumerate(shape) if d != looked[0])
        return Lookup(looked[0], indices, offset, ndim) if whole else None
    # The starts of whole axes are clipped to 0, whatever they are.
    clipped = p["mode"] in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    cut = [d for d, n in enumerate(shape) if sizes[d] != n]
    if numbers.collapsed_slice_dims or not clipped or len(cut) != 1 or sizes[cut[0]] != 1 or cut[0] not in looked:
        return None
    (axis,) = cut
    place, kept = looked.index(axis), offset[axis]
    rest = tuple(d - (d > kept) for i, d in enumerate(offset) if i != axis)
    return Lookup(axis, indices[..., place : place + 1], rest, ndim - 1, kept)


@rule("gather", keeps=True)
def gather(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """Whole slices looked up along one axis.

    Rows of an embedding: the same rows of the factor that varies along that axis, times the other. Matrices of a
    stack (experts): the result is a weight again.
    """
    weight, indices = args
    if not isinstance(weight, Weight) or isinstance(indices, Weight):
        return "used as indices"
    look = _lookup(eqn, weight.shape, indices)
    if look is None:
        return "a gather that is not a lookup of whole slices along one axis"
    axis = look.axis
    rest = tuple(d for d in range(weight.w.ndim) if d != axis)
    if not rest:
        return "a lookup of scalars"
    matrices = len(rest) > 1 and sum(weight.shape[d] > 1 for d in rest) > 1
    if weight.probe:
        if not matrices:
            ctx.record(weight, eqn, 0, how="lookup", dims=((axis,), rest))
            (y,) = bind(eqn, [weight.w, indices])
            if ctx.tap is not None:
                looked_up = Partial(lambda indices, _: indices.reshape(-1), look.indices)
                y = ctx.tapped(eqn, weight, ((axis,), rest, ()), y, looked_up)
            return [y]
        parts = tuple(p._replace(looked=(*p.looked, *p.dims[axis])) for p in weight.parts)
        return [_with_kept(_looked_up(eqn, replace(weight, parts=parts), indices, look), look)]
    a, b = weight.factors()
    along = [axis in weight.owned(f) for f in (a, b)]
    if along == [True, True] or (matrices and weight.shape[axis] == 1):
        if weight.gain is not None and _fills(eqn):
            return "entries out of bounds are filled, and magnitudes must not scale what fills them"
        return [_with_kept(_looked_up(eqn, weight, indices, look), look)]
    if along == [False, False] and weight.shape[axis] > 1:
        return "a lookup along an axis it was broadcast to"
    down, up = (a, b) if along[0] else (b, a)
    product = Product(
        1, prod(look.indices.shape[:-1]), weight.shape[axis], prod(weight.shape) // weight.shape[axis], a.shape[0]
    )
    if weight.owned(down) != {axis} or weight.owned(up) & {axis}:
        reason = "a lookup along one of several inputs"
    else:
        reason = "only the rows looked up are multiplied"
    ctx.record(weight, eqn, 0, how="lookup", reason=reason, product=product)
    dtype = ctx.update_dtype(weight.w)

    def rows(weight: Weight, indices: Array, look: Lookup) -> Array:
        picked = _looked_up(eqn, weight, indices, look)
        y = picked.base() + picked.update(dtype).astype(picked.w.dtype)
        if picked.gain is not None:
            scaled = multiplied(y, picked.gain)
            y = jnp.where(_inside(weight, look), scaled, y) if _fills(eqn) else scaled
        return y if look.kept is None else jnp.expand_dims(y, look.kept)

    return [ctx.kept(lambda weight, indices, at: rows(weight, indices, look._replace(indices=at)), *args, look.indices)]


def _fills(eqn: Any) -> bool:
    """Whether a gather fills entries out of bounds with what a magnitude could change: not with NaN."""
    fill = eqn.params["fill_value"]
    return eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP and fill is not None and fill == fill


def _inside(weight: Weight, look: Lookup) -> Array:
    """Whether indices are in bounds, against the output's dimensions."""
    at = look.indices[..., 0]
    return lax.expand_dims((at >= 0) & (at < weight.shape[look.axis]), look.offset)


def _with_kept(weight: Weight, look: Lookup) -> Weight:
    """The weight of looked-up slices, with the axis of size 1 that the gather left."""
    kept = look.kept
    if kept is None:
        return weight
    return weight.mapped(
        Partial(lambda w: jnp.expand_dims(w, kept)),
        lambda f, lead: jnp.expand_dims(f, lead + kept),
        lambda held: (*held[:kept], (), *held[kept:]),
    )


def _looked_up(eqn: Any, weight: Weight, indices: Array, look: Lookup) -> Weight:
    """The weight of the looked-up slices. The indices' own axes fill the places that `offset` leaves."""
    axis, offset = look.axis, look.offset
    lead_places = tuple(d for d in range(look.ndim) if d not in offset)

    def change(x: Array, lead: int) -> Array:
        if x.shape[lead + axis] == 1 and weight.shape[axis] > 1:
            # The same for all indices: only new axes of size 1.
            x = jnp.squeeze(x, lead + axis)
            return jnp.expand_dims(x, tuple(lead + d for d in lead_places))
        taken = lax.gather(
            x,
            look.indices,
            lax.GatherDimensionNumbers(
                offset_dims=(*range(lead), *(lead + d for d in offset)),
                collapsed_slice_dims=(lead + axis,),
                start_index_map=(lead + axis,),
            ),
            slice_sizes=(*x.shape[:lead], *(1 if d == axis else x.shape[lead + d] for d in range(weight.w.ndim))),
            mode=eqn.params["mode"],
            fill_value=0,  # an entry out of bounds has no update; the base's lookup fills it
        )
        return taken

    def dims(held: Any) -> tuple[Any, ...]:
        kept = iter(x for d, x in enumerate(held) if d != axis)
        return tuple(next(kept) if d in offset else () for d in range(look.ndim))

    return weight.mapped(_entries(eqn, weight, indices, look), change, dims)


def _entries(eqn: Any, weight: Weight, indices: Array, look: Lookup) -> Partial:
    """The lookup in the base; in a quantised table only the rows looked up are restored."""

    def without_kept(y: Array) -> Array:
        return y if look.kept is None else jnp.squeeze(y, look.kept)

    whole = Partial(lambda indices, w: without_kept(bind(eqn, [w, indices])[0]), indices)
    if weight.empty:

        def zeros(indices: Array, w: Array) -> Array:
            """Zeros for valid indices and the fill value for others, from a table of one column instead of all."""
            thin = tuple(n if d == look.axis else 1 for d, n in enumerate(w.shape))
            y = lax.gather(
                lax.slice(w, (0,) * w.ndim, thin), indices, eqn.params["dimension_numbers"], (1,) * w.ndim,
                mode=eqn.params["mode"], fill_value=eqn.params["fill_value"],
            )  # fmt: skip
            return without_kept(jnp.broadcast_to(y, eqn.outvars[0].aval.shape))

        return Partial(zeros, indices)
    source = weight.source
    if source is None or source.steps or look.axis != 0 or weight.w.ndim != 2:
        return whole
    table, fill = source.quantised, eqn.params["fill_value"]

    def rows(table: Quantised, at: Array, _: Array) -> Array:
        at = at[..., 0]
        inside = (at >= 0) & (at < table.shape[0])
        entries = table.rows(at)
        if eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
            entries = jnp.where(inside[..., None], entries, jnp.nan if fill is None else fill)
        return entries

    plain = look.offset == (look.indices.ndim - 1,)
    return Partial(rows, table, look.indices) if plain else whole
