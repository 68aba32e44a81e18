"""Rules of loops: layers scanned over a stacked parameter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax_kit.transform.interpret import Context, closed, evaluate_arrays, materialise, rule
from lorax_kit.transform.weight import Weight


def _scanned(weight: Weight) -> Weight | str:
    """A weight whose leading dimension is scanned over, with that axis first in every array."""
    axis = weight.axes[0]
    if weight.site is None:
        return weight
    if axis not in weight.stack:
        return f"scanned over axis {axis}, which the plan does not stack"
    place = weight.stack.index(axis)

    def front(x: Any, offset: int) -> Any:
        return None if x is None else jnp.moveaxis(x, place + offset, 0)

    length = weight.w.shape[0]
    return replace(
        weight,
        a=front(weight.a, 1),
        b=front(weight.b, 1),
        column=front(weight.column, 0),
        scale=jnp.broadcast_to(jnp.asarray(weight.scale), (length,)),
        key=None if weight.key is None else jax.random.split(weight.key, length),
    )


def _layer(weight: Weight) -> Weight:
    """Inside the scan: one layer's weight, its leading axis consumed."""
    axis, rest = weight.axes[0], weight.axes[1:]
    if weight.site is None:
        return replace(weight, axes=rest, stack=(*weight.stack, axis))
    return replace(weight, axes=rest, stack=tuple(i for i in weight.stack if i != axis))


@rule("scan")
def scan(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """Layers scanned over a stacked parameter, or a parameter that every step reads."""
    n_consts, n_carry = eqn.params["num_consts"], eqn.params["num_carry"]
    jaxpr, jaxpr_consts = closed(eqn.params["jaxpr"])
    consts = args[:n_consts]
    carry = materialise(ctx, eqn, args[n_consts : n_consts + n_carry], "carried from step to step of a scan")
    xs = []
    for i, x in enumerate(args[n_consts + n_carry :]):
        if isinstance(x, Weight):
            moved: Any = _scanned(x)
            if isinstance(moved, str):
                ctx.record(x, eqn, n_consts + n_carry + i, how="materialised", reason=moved)
                moved = x.materialise()
            x = moved
        xs.append(x)
    inside = replace(ctx, repeats=ctx.repeats * eqn.params["length"])

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        layer = [_layer(x) if isinstance(x, Weight) else x for x in xs]
        out = evaluate_arrays(inside, jaxpr, jaxpr_consts, [*consts, *carry, *layer])
        return out[:n_carry], out[n_carry:]

    options = {k: eqn.params[k] for k in ("reverse", "unroll", "_split_transpose") if k in eqn.params}
    carry, ys = lax.scan(body, carry, xs, length=eqn.params["length"], **options)
    return [*carry, *ys]
