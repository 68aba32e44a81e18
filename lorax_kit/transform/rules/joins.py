"""Rules of joining parameters: concatenated, stacked or added, as one parameter of more entries or of a higher rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from lorax_kit.arrays.dtypes import wide, widest
from lorax_kit.transform.base import Dense, combined
from lorax_kit.transform.context import Context
from lorax_kit.transform.interpreter.registry import rule
from lorax_kit.transform.weight import Parameter, Probe, Weight


@rule("concatenate")
def concatenate(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """Parameters joined, with each other or with plain arrays."""
    joined = join(args, eqn.params["dimension"])
    return joined if isinstance(joined, str) else [joined]


@rule("stack")
def stack(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """Parameters stacked along a new axis."""
    d = eqn.params["axis"]

    def spread(x: Any) -> Any:
        if not isinstance(x, Parameter):
            return jnp.expand_dims(x, d)
        return x.mapped(
            Partial(lambda w: jnp.expand_dims(w, d)),
            lambda f, lead: jnp.expand_dims(f, lead + d),
            lambda held: (*held[:d], (), *held[d:]),
        )

    joined = join([spread(x) for x in args], d)
    return joined if isinstance(joined, str) else [joined]


@rule("add", "add_any", "sub")
def add(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """The sum of two parameters is one whose ranks add up."""
    if not all(isinstance(x, Parameter) for x in args):
        return "added to an array"
    one, two = args
    sign = -1 if eqn.primitive.name == "sub" else 1
    w, parts = one.base.array() + sign * two.base.array(), one.parts + two.parts
    base = combined(w, (one.base, two.base))
    if isinstance(one, Probe):
        return [Probe(parts=parts, base=base)]
    if _unlike(args) or one.gain is not None or two.gain is not None or one.shape != two.shape:
        return "added to a parameter whose inputs and outputs lie otherwise, or that has magnitudes or dropout"
    (a1, b1), (a2, b2) = _scaled(one), _scaled(two)
    a, b = (_concatenate(pair, 0) for pair in ((a1, a2 if sign > 0 else -a2), (b1, b2)))
    return [Weight(parts=parts, base=base, a=a, b=b, scale=jnp.ones((), jnp.float32))]


def _unlike(weights: Sequence[Weight]) -> bool:
    """Whether ranks cannot be put one below the other: other dimensions vary, or dropout masks differ."""
    layouts = {(x.a.shape[1:], x.b.shape[1:]) for x in weights}
    return len(layouts) > 1 or any(x.key is not None for x in weights)


def _kind(weight: Weight, d: int) -> str:
    """Which factors vary along a dimension: "a", "b", "both", "none", or "any" where its size is 1."""
    if weight.shape[d] == 1:
        return "any"
    a, b = (d in weight.owned(f) for f in (weight.a, weight.b))
    return "both" if a and b else "a" if a else "b" if b else "none"


def join(args: Sequence[Any], d: int) -> Parameter | str:
    """Weights, and arrays (which have no update), concatenated along dimension `d`; or why that is not possible.

    Where both factors vary along `d` (stacked layers or experts) both are concatenated. Where one does, the ranks
    add up: its entries lie block by block along `d`, and the other factor's rows one below the other.
    """
    bases = [x.base if isinstance(x, Parameter) else Dense(x) for x in args]
    base = combined(jnp.concatenate([x.array() for x in bases], d), bases)
    parts = tuple(p for x in args if isinstance(x, Parameter) for p in x.parts)
    weights = [x for x in args if isinstance(x, Weight)]
    if not weights:
        return Probe(parts=parts, base=base)
    if any(x.key is not None for x in weights):
        return "joined with others, while each has a dropout of its own"
    kinds = {_kind(x, d) for x in weights} - {"any"}
    if not kinds:  # new axes of size 1: a stack, or columns
        kinds = {"both"} if len(base.shape) > 2 else {"b" if weights[0].owned(weights[0].a) else "a"}
    if len(kinds) > 1 or kinds == {"none"}:
        return "joined along an axis that is an input of one and an output of another"
    pairs = _stacked(args, d) if kinds == {"both"} else _blocks(args, d, 0 if kinds == {"a"} else 1)
    if isinstance(pairs, str):
        return pairs
    return Weight(
        parts=parts,
        base=base,
        a=pairs[0],
        b=pairs[1],
        gain=_gains(args, d),
        scale=jnp.ones((), jnp.float32),
    )


def _scaled(weight: Weight) -> tuple[Array, Array]:
    return weight.a.astype(wide(weight.a.dtype)) * weight.scale, weight.b


def _concatenate(arrays: Sequence[Array], axis: int) -> Array:
    """Concatenated in the widest of their dtypes: parameters may have factors of different ones."""
    dtype = widest(*(x.dtype for x in arrays))
    return jnp.concatenate([x.astype(dtype) for x in arrays], axis)


def _stacked(args: Sequence[Any], d: int) -> tuple[Array, Array]:
    """Both factors concatenated along `d`; lower ranks are filled up with zero rows, arrays are all zero."""
    rank = max(1, *(x.a.shape[0] for x in args if isinstance(x, Weight)))
    pairs = [_scaled(x) if isinstance(x, Weight) else (jnp.zeros((1, *(1,) * jnp.ndim(x))),) * 2 for x in args]
    out = []
    for side in (0, 1):
        filled = [jnp.pad(p[side], [(0, rank - p[side].shape[0])] + [(0, 0)] * (p[side].ndim - 1)) for p in pairs]
        out.append(_concatenated(filled, [x.shape[d] for x in args], 1 + d))
    return out[0], out[1]


def _concatenated(arrays: Sequence[Array], sizes: Sequence[int], axis: int) -> Array:
    """Concatenate along an axis, after broadcasting each to its size there and to the greatest size elsewhere."""
    widest = [max(n) for n in zip(*(x.shape for x in arrays), strict=True)]
    shapes = [(*widest[:axis], size, *widest[axis + 1 :]) for size in sizes]
    return _concatenate([jnp.broadcast_to(x, s) for x, s in zip(arrays, shapes, strict=True)], axis)


def _blocks(args: Sequence[Any], d: int, side: int) -> tuple[Array, Array] | str:
    """The factor of `side` in blocks along `d`, the other's rows one below the other."""
    total = sum(x.shape[d] for x in args)
    blocks, rows, at = [], [], 0
    for x in args:
        n = x.shape[d]
        if isinstance(x, Weight):
            pair = _scaled(x)
            around = [(0, 0)] * pair[side].ndim
            around[1 + d] = (at, total - at - n)
            blocks.append(jnp.pad(pair[side], around))
            rows.append(pair[1 - side])
        at += n
    if len({x.shape[1:] for x in blocks}) > 1 or len({x.shape[1:] for x in rows}) > 1:
        return "joined with a parameter whose inputs and outputs lie otherwise"
    pair = _concatenate(blocks, 0), _concatenate(rows, 0)
    return pair if side == 0 else pair[::-1]


def _gains(args: Sequence[Any], d: int) -> Array | None:
    """Magnitudes joined; 1 for what has none."""
    if not any(isinstance(x, Weight) and x.gain is not None for x in args):
        return None
    sizes = [x.shape[d] for x in args]
    ndim = max(x.ndim for x in args if isinstance(x, Weight))
    gains = [x.gain if isinstance(x, Weight) and x.gain is not None else jnp.ones((1,) * ndim) for x in args]
    return _concatenated(gains, sizes, d)
