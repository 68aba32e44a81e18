"""Rules of scaling and casting: a parameter times a number or a diagonal, negated, or in another dtype."""

from __future__ import annotations

from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from lorax_kit.arrays.dtypes import widest
from lorax_kit.transform.context import Context
from lorax_kit.transform.interpreter.bind import bind
from lorax_kit.transform.interpreter.registry import rule
from lorax_kit.transform.weight import Parameter, Probe, with_base


@rule("convert_element_type", "reduce_precision")
def convert_element_type(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """A cast of the base; the factors are cast where they are used."""
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return f"cast to {eqn.outvars[0].aval.dtype}"
    return [args[0].rebased(Partial(lambda w: bind(eqn, [w])[0]))]


@rule("neg")
def neg(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """The negative of a parameter."""
    (weight,) = args
    scale = {} if isinstance(weight, Probe) else {"scale": -weight.scale}
    return [weight.rebased(Partial(lambda w: -w), **scale)]


@rule("mul", "div")
def multiply(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """Times (or divided by) a number, or an array that varies along the inputs only, or along the outputs only."""
    if all(isinstance(x, Parameter) for x in args):
        return "multiplied entry by entry with another adapted parameter"
    at = 0 if isinstance(args[0], Parameter) else 1
    weight, other = args[at], args[1 - at]
    if eqn.primitive.name == "div" and at == 1:
        return "divides an array"
    if weight.shape != tuple(eqn.outvars[0].aval.shape):
        return "broadcast in a product with an array"
    shape, small = _narrow(ctx, eqn.invars[1 - at], other, weight.ndim)
    wide = {d for d, n in enumerate(shape) if n > 1}

    base = with_base(lambda values: bind(eqn, values)[0], args)
    if len(wide) > weight.ndim - 1:
        return "multiplied entry by entry with an array"
    if isinstance(weight, Probe):
        return [weight.rebased(base)]
    small = jnp.reshape(small, shape).astype(widest(weight.a.dtype, jnp.result_type(small)))
    if eqn.primitive.name == "div":
        small = 1 / small
    if not wide:
        return [weight.rebased(base, scale=weight.scale * jnp.reshape(small, ()).astype(weight.scale.dtype))]
    for name, factor in (("a", weight.a), ("b", weight.b)):
        if wide <= weight.owned(factor):
            return [weight.rebased(base, **{name: factor * small[None].astype(factor.dtype)})]
    return "multiplied with an array that varies along inputs and outputs"


def _narrow(ctx: Context, var: Any, x: Any, ndim: int) -> tuple[tuple[int, ...], Array]:
    """The array that was broadcast to `x`, and its shape with axes of size 1 where it was; else `x` itself."""
    if not isinstance(var, jex.Literal) and var in ctx.narrow:
        return ctx.narrow[var]
    return (jnp.shape(x) or (1,) * ndim), x
