"""Rules of layout: operations that move or cut the entries of a parameter do the same to its factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.tree_util import Partial

from lorax_kit.transform.base import Dense, Empty, Restored, combined
from lorax_kit.transform.context import Context
from lorax_kit.transform.interpreter.bind import bind
from lorax_kit.transform.interpreter.registry import rule
from lorax_kit.transform.weight import Parameter, Probe, Weight, with_base


def _base(eqn: Any, args: Sequence[Any]) -> Partial:
    """The operation on the base alone; its other operands are leaves."""
    return with_base(lambda values: bind(eqn, values)[0], args)


@rule("transpose")
def transpose(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """Reordered dimensions."""
    order = eqn.params["permutation"]

    def change(x: Array, lead: int) -> Array:
        return jnp.transpose(x, (*range(lead), *(lead + d for d in order)))

    return [args[0].mapped(_base(eqn, args), change, lambda dims: tuple(dims[d] for d in order))]


def segments(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Dimensions that a reshape turns into each other: the finest split into runs of equal size."""
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while prod(old[i0:i]) != prod(new[j0:j]):
            if prod(old[i0:i]) < prod(new[j0:j]):
                i += 1
            else:
                j += 1
        yield range(i0, i), range(j0, j)


@rule("reshape")
def reshape(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """Dimensions split or merged, where each factor varies with all of a run of them or with none."""
    weight, new = args[0], eqn.params["new_sizes"]
    if eqn.params.get("dimensions") is not None:
        return "reshaped in another order than the array's own"
    runs = list(segments(weight.shape, new))
    each = [weight.owned(x, lead) for x, lead in weight.arrays().values()]
    varied = frozenset().union(*each)
    for owned in each:
        for mine, _ in runs:
            wide = {d for d in mine if weight.shape[d] > 1} & varied
            if wide & owned and wide - owned:
                return f"reshaped to {tuple(new)}, which merges inputs with outputs"

    def change(x: Array, lead: int) -> Array:
        owned, spread, sizes = weight.owned(x, lead), list(x.shape), []
        for mine, theirs in runs:
            full = any(d in owned for d in mine)
            sizes += [new[d] if full else 1 for d in theirs]
            for d in mine if full else ():  # what the parameter was broadcast to goes along
                spread[lead + d] = weight.shape[d]
        return jnp.broadcast_to(x, spread).reshape(*x.shape[:lead], *sizes)

    def dims(held: Any) -> tuple[Any, ...]:
        out: list[Any] = []
        for mine, theirs in runs:
            together = tuple(sorted({axis for d in mine for axis in held[d]}))
            wide = sum(new[d] > 1 for d in theirs)
            # An axis of size 1 beside the one that holds the entries holds none of them.
            out += [together if new[d] > 1 or not wide else () for d in theirs]
        return tuple(out)

    return [weight.mapped(_base(eqn, args), change, dims)]


@rule("squeeze")
def squeeze(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """Dimensions of size 1 dropped."""
    gone = {d % args[0].ndim for d in eqn.params["dimensions"]}

    def change(x: Array, lead: int) -> Array:
        return jnp.squeeze(x, tuple(lead + d for d in gone))

    return [
        args[0].mapped(_base(eqn, args), change, lambda dims: tuple(x for d, x in enumerate(dims) if d not in gone))
    ]


@rule("broadcast_in_dim", "expand_dims")
def broadcast_in_dim(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """New dimensions, with which neither factor varies."""
    where, ndim = eqn.params["broadcast_dimensions"], len(eqn.params["shape"])

    def change(x: Array, lead: int) -> Array:
        return jnp.expand_dims(x, tuple(lead + d for d in range(ndim) if d not in where))

    def dims(held: Any) -> tuple[Any, ...]:
        return tuple(held[where.index(d)] if d in where else () for d in range(ndim))

    return [args[0].mapped(_base(eqn, args), change, dims)]


Cut = Callable[[Array, Callable[[int], bool], int], Array]


def _cut(weight: Parameter, base: Partial, cut: Cut) -> Parameter:
    """A weight whose entries were chosen along each dimension; `cut(x, varies, lead)` does it to a factor."""

    def change(x: Array, lead: int) -> Array:
        owned = weight.owned(x, lead)
        return cut(x, lambda d: d in owned or weight.shape[d] == 1, lead)

    return weight.mapped(base, change, lambda dims: dims)


@rule("slice")
def slice_(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """A static slice."""
    p = eqn.params
    strides = p["strides"] or (1,) * args[0].ndim

    def cut(x: Array, varies: Callable[[int], bool], lead: int) -> Array:
        spans = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
        own = [slice(*span) if varies(d) else slice(None) for d, span in enumerate(spans)]
        return x[(slice(None),) * lead + tuple(own)]

    return [_cut(args[0], _base(eqn, args), cut)]


@rule("dynamic_slice")
def dynamic_slice(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """A slice whose start is computed: one layer of a stack, say."""
    weight, starts = args[0], args[1:]
    if not isinstance(weight, Parameter) or any(isinstance(x, Parameter) for x in starts):
        return "used as indices"
    sizes = eqn.params["slice_sizes"]

    def cut(x: Array, varies: Callable[[int], bool], lead: int) -> Array:
        zero = jnp.zeros_like(starts[0])
        begin = [zero] * lead + [s if varies(d) else zero for d, s in enumerate(starts)]
        size = [*x.shape[:lead], *(n if varies(d) else 1 for d, n in enumerate(sizes))]
        return lax.dynamic_slice(x, begin, size)

    return [_cut(weight, _base(eqn, args), cut)]


@rule("split", "unstack")
def split(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """Cut into pieces along one dimension; `unstack` into pieces of size 1, whose dimension it drops."""
    (weight,), d = args, eqn.params["axis"]
    unstacked = eqn.primitive.name == "unstack"
    sizes = (1,) * weight.shape[d] if unstacked else eqn.params["sizes"]
    pieces, at = [], 0

    def dims(held: Any) -> tuple[Any, ...]:
        return (*held[:d], *held[d + 1 :]) if unstacked else held

    for i, n in enumerate(sizes):

        def change(x: Array, lead: int, at: int = at, n: int = n) -> Array:
            piece = lax.slice_in_dim(x, at, at + n, axis=lead + d) if x.shape[lead + d] == weight.shape[d] else x
            return jnp.squeeze(piece, lead + d) if unstacked else piece

        def piece(values: list[Any], i: int = i) -> Array:
            return bind(eqn, values)[i]

        pieces.append(weight.mapped(with_base(piece, args), change, dims))
        at += n
    return pieces


@rule("tile")
def tile(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """Repeated along its dimensions."""
    reps = eqn.params["reps"]

    def cut(x: Array, varies: Callable[[int], bool], lead: int) -> Array:
        return jnp.tile(x, (1,) * lead + tuple(n if x.shape[lead + d] > 1 else 1 for d, n in enumerate(reps)))

    return [_cut(args[0], _base(eqn, args), cut)]


@rule("rev")
def rev(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """Entries in reverse order."""

    def cut(x: Array, varies: Callable[[int], bool], lead: int) -> Array:
        return lax.rev(x, tuple(lead + d for d in eqn.params["dimensions"]))

    return [_cut(args[0], _base(eqn, args), cut)]


@rule("pad")
def pad(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """Entries added around or between: the update there is zero, whatever the base is given."""
    weight, config = args[0], eqn.params["padding_config"]
    if not isinstance(weight, Parameter):
        return "used as the value of padding"
    padded = {d for d, (low, high, inner) in enumerate(config) if low or high or inner}
    zero = isinstance(eqn.invars[1], jex.Literal) and float(eqn.invars[1].val) == 0
    if isinstance(weight.base, Empty) and not zero:  # what is known only when it runs may not be zero
        weight = replace(weight, base=Dense(weight.base.w))
    base = _padded(args[1], config)
    if isinstance(weight, Probe):
        return [weight.rebased(base)]
    assert isinstance(weight, Weight)
    if weight.gain is not None or any(weight.shape[d] == 1 for d in padded):
        return "padded under magnitudes, or along an axis of size 1"
    if not padded <= weight.owned(weight.a) | weight.owned(weight.b):
        return "padded along an axis it was broadcast to"

    def cut(x: Array, varies: Callable[[int], bool], lead: int) -> Array:
        none = (0, 0, 0)
        own = [c if varies(d) else none for d, c in enumerate(config)]
        return lax.pad(x, jnp.zeros((), x.dtype), [none] * lead + own)

    return [_cut(weight, base, cut)]


def _padded(value: Any, config: Any) -> Partial:
    """Padding with `value`; JAX cannot differentiate `lax.pad` with regard to the value alone."""

    def run(value: Any, w: Array) -> Array:
        inside = lax.pad(jnp.ones(w.shape, bool), jnp.zeros((), bool), config)
        spread = jnp.broadcast_to(jnp.asarray(value, w.dtype), inside.shape)
        return lax.select(inside, lax.pad(w, jnp.zeros((), w.dtype), config), spread)

    return Partial(run, value)


@rule("reshard", "mesh_cast")
def moved(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """To another place of the same mesh, or to another kind of its axes; factors then lie on all devices."""
    (weight,) = args
    base = weight.base.changed(Partial(lambda w: bind(eqn, [w])[0]))
    rest = jax.tree.map(lambda x: jax.sharding.reshard(x, PartitionSpec()), replace(weight, base=None))
    return [replace(rest, base=base)]


@rule("copy", "copy_p", "sharding_constraint", "optimization_barrier")
def passed_on(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """Operations that change nothing about the values."""
    bases = [x.base if isinstance(x, Parameter) else Dense(x) for x in args]
    if any(isinstance(x, Restored) for x in bases):
        return args
    out = bind(eqn, [x.array() for x in bases])
    pairs = zip(args, out, strict=True)
    return [replace(x, base=combined(y, [x.base])) if isinstance(x, Parameter) else y for x, y in pairs]
