"""Rules of lookups: entries of a parameter chosen by index (embeddings, experts)."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import Partial

from lorax_kit.transform.context import Context
from lorax_kit.transform.cost import Product
from lorax_kit.transform.interpreter.bind import bind
from lorax_kit.transform.interpreter.registry import rule
from lorax_kit.transform.weight import Parameter, Probe, Weight, multiplied

P = TypeVar("P", bound=Parameter)


class Lookup(NamedTuple):
    """A gather of whole slices along one axis of the weight.

    Attributes:
      axis: the weight's.
      indices: (*, 1) int, places along it.
      starts: (*, n) int, of the gather: `indices` among them.
      offset: where the other axes lie in the output, once `kept` is dropped.
      ndim: dimensions of that output.
      kept: the output's axis of size 1 that is left of the looked-up one (a `vmap` of `dynamic_slice` leaves it).
      params: of the gather.
    """

    axis: int
    indices: Array
    starts: Array
    offset: tuple[int, ...]
    ndim: int
    kept: int | None
    params: dict[str, Any]

    @property
    def fill(self) -> Any:
        """What entries out of bounds hold; None where indices are clipped to what there is."""
        if self.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
            return None
        return jnp.nan if self.params["fill_value"] is None else self.params["fill_value"]

    @property
    def scales_fill(self) -> bool:
        """Whether a magnitude would change what entries out of bounds hold: not NaN."""
        return self.fill is not None and self.fill == self.fill

    def take(self, starts: Array, w: Array) -> Array:
        """The slices of an array, which may be thinner than the weight, but for the axis; `kept` is dropped."""
        p = self.params
        y = lax.gather(
            w, starts, p["dimension_numbers"], tuple(1 if d == self.axis else n for d, n in enumerate(w.shape)),
            indices_are_sorted=p["indices_are_sorted"], unique_indices=p["unique_indices"],
            mode=p["mode"], fill_value=p["fill_value"],
        )  # fmt: skip
        return y if self.kept is None else jnp.squeeze(y, self.kept)


def _lookup(eqn: Any, weight: Parameter, starts: Array) -> Lookup | str:
    """What a gather looks up; or why it is refused: it is anything but whole slices along one axis."""
    refused = "a gather that is not a lookup of whole slices along one axis"
    p, shape = eqn.params, weight.shape
    numbers, sizes, ndim = p["dimension_numbers"], p["slice_sizes"], len(eqn.outvars[0].aval.shape)
    offset, looked = tuple(map(int, numbers.offset_dims)), tuple(map(int, numbers.start_index_map))
    cut = [d for d, n in enumerate(shape) if sizes[d] != n]
    if numbers.operand_batching_dims:
        return refused
    if len(looked) == 1 and numbers.collapsed_slice_dims == numbers.start_index_map:
        look = Lookup(looked[0], starts, starts, offset, ndim, None, p)
        if set(cut) - set(looked):
            return refused
    else:
        # The starts of whole axes are clipped to 0, whatever they are.
        clipped = p["mode"] in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
        if numbers.collapsed_slice_dims or not clipped or len(cut) != 1 or sizes[cut[0]] != 1 or cut[0] not in looked:
            return refused
        (axis,) = cut
        place, kept = looked.index(axis), offset[axis]
        rest = tuple(d - (d > kept) for i, d in enumerate(offset) if i != axis)
        look = Lookup(axis, starts[..., place : place + 1], starts, rest, ndim - 1, kept, p)
    return look if weight.ndim > 1 else "a lookup of scalars"


@rule("gather", keeps=True)
def gather(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """Whole slices looked up along one axis: matrices of a stack (experts), a weight again; or rows of a table."""
    weight, indices = args
    if not isinstance(weight, Parameter) or isinstance(indices, Parameter):
        return "used as indices"
    look = _lookup(eqn, weight, indices)
    if isinstance(look, str):
        return look
    return _matrices(weight, look) if _is_stack(weight, look.axis) else _rows(ctx, eqn, weight, look)


def _is_stack(weight: Parameter, axis: int) -> bool:
    """Whether matrices lie along an axis: both factors vary along it, or neither can, as it is of size 1."""
    if isinstance(weight, Weight) and weight.shape[axis] > 1:
        return axis in weight.owned(weight.a) & weight.owned(weight.b)
    return sum(n > 1 for d, n in enumerate(weight.shape) if d != axis) > 1


def _matrices(weight: Parameter, look: Lookup) -> list[Any] | str:
    """Matrices of a stack: the parameter that they are."""
    if "gain" in weight.arrays() and look.scales_fill:
        return "entries out of bounds are filled, and magnitudes must not scale what fills them"
    if isinstance(weight, Probe):
        parts = tuple(p._replace(looked=(*p.looked, *p.dims[look.axis])) for p in weight.parts)
        weight = replace(weight, parts=parts)
    picked, kept = _picked(weight, look), look.kept
    if kept is None:
        return [picked]
    return [
        picked.mapped(
            Partial(lambda w: jnp.expand_dims(w, kept)),
            lambda f, lead: jnp.expand_dims(f, lead + kept),
            lambda held: (*held[:kept], (), *held[kept:]),
        )
    ]


def _rows(ctx: Context, eqn: Any, weight: Any, look: Lookup) -> list[Any] | str:
    """Rows of a table: those of the factor that varies along the axis, times the other."""
    axis, size = look.axis, weight.shape[look.axis]
    rest = tuple(d for d in range(weight.ndim) if d != axis)
    if isinstance(weight, Probe):
        ctx.record(weight, eqn, 0, how="lookup", dims=((axis,), rest))
        (y,) = bind(eqn, [weight.base.array(), look.starts])
        looked_up = Partial(lambda indices, _: indices.reshape(-1), look.indices)
        return [ctx.tapped(eqn, weight, ((axis,), rest, ()), y, looked_up)]
    a, b = weight.owned(weight.a), weight.owned(weight.b)
    if axis not in a | b and size > 1:
        return "a lookup along an axis it was broadcast to"
    down, up = (a, b) if axis in a else (b, a)
    alone = down == {axis} and axis not in up
    reason = "only the rows looked up are multiplied" if alone else "a lookup along one of several inputs"
    product = Product(1, prod(look.indices.shape[:-1]), size, prod(weight.shape) // size, weight.a.shape[0])
    ctx.record(weight, eqn, 0, how="lookup", reason=reason, product=product)
    dtype = ctx.update_dtype(weight.base)

    def rows(weight: Weight, starts: Array, indices: Array) -> Array:
        picked = _picked(weight, look._replace(starts=starts, indices=indices))
        y = picked.base.array() + picked.update(dtype).astype(picked.base.dtype)
        if picked.gain is not None:
            if look.fill is None:
                y = multiplied(y, picked.gain)
            else:  # what fills is not scaled, and has no part in the magnitudes' gradient, NaN least of all
                at = indices[..., 0]
                inside = lax.expand_dims((at >= 0) & (at < size), look.offset)
                y = jnp.where(inside, multiplied(jnp.where(inside, y, 0), picked.gain), y)
        return y if look.kept is None else jnp.expand_dims(y, look.kept)

    return [ctx.kept(rows, weight, look.starts, look.indices)]


def _picked(weight: P, look: Lookup) -> P:
    """The weight of the looked-up slices. The indices' own axes fill the places that `offset` leaves."""
    axis, offset = look.axis, look.offset
    lead_places = tuple(d for d in range(look.ndim) if d not in offset)

    def change(x: Array, lead: int) -> Array:
        if x.shape[lead + axis] == 1 and weight.shape[axis] > 1:
            # The same for all indices: only new axes of size 1.
            x = jnp.squeeze(x, lead + axis)
            return jnp.expand_dims(x, tuple(lead + d for d in lead_places))
        return lax.gather(
            x,
            look.indices,
            lax.GatherDimensionNumbers(
                offset_dims=(*range(lead), *(lead + d for d in offset)),
                collapsed_slice_dims=(lead + axis,),
                start_index_map=(lead + axis,),
            ),
            slice_sizes=(*x.shape[:lead], *(1 if d == axis else x.shape[lead + d] for d in range(weight.ndim))),
            mode=look.params["mode"],
            fill_value=0,  # an entry out of bounds has no update; the base's lookup fills it
        )

    def dims(held: Any) -> tuple[Any, ...]:
        kept = iter(x for d, x in enumerate(held) if d != axis)
        return tuple(next(kept) if d in offset else () for d in range(look.ndim))

    at = look.indices[..., 0] if look.offset == (look.indices.ndim - 1,) else None
    moved = weight.arranged(change, dims)
    return replace(moved, base=weight.base.entries(Partial(look.take, look.starts), axis, at, look.fill))
