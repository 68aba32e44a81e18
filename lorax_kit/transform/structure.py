"""Rules of the primitives that only carry a parameter on: layout, dtype, and calls of other functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from lorax_kit.transform.interpret import Context, bind, evaluate, evaluate_arrays, materialise, rule
from lorax_kit.transform.weight import Weight


@rule("transpose")
def transpose(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """A transposed weight: the factors stay as they are."""
    (weight,), order = args, eqn.params["permutation"]
    w = lax.transpose(weight.w, order)
    return [replace(weight, w=w, axes=tuple(weight.axes[d] for d in order))]


@rule("convert_element_type")
def convert_element_type(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """A cast of the base; the factors are cast where they are used."""
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return f"cast to {eqn.params['new_dtype']}"
    return [replace(args[0], w=bind(eqn, [args[0].w])[0])]


@rule("copy", "copy_p", "sharding_constraint", "optimization_barrier")
def passed_on(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """Operations that change nothing about the values."""
    out = bind(eqn, [x.w if isinstance(x, Weight) else x for x in args])
    return [replace(x, w=y) if isinstance(x, Weight) else y for x, y in zip(args, out, strict=True)]


def _closed(jaxpr: Any) -> tuple[Any, Any]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, jex.ClosedJaxpr) else (jaxpr, ())


@rule("jit", "pjit", "closed_call", "core_call")
def call(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """A nested jit is inlined: the program around it is compiled anyway."""
    jaxpr, consts = _closed(eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"])
    return evaluate(ctx, jaxpr, consts, args)


@rule("remat2", "remat", "checkpoint")
def checkpoint(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """Rematerialised under the same policy, with the low-rank products inside."""
    jaxpr, consts = _closed(eqn.params["jaxpr"])

    def body(*values: Any) -> list[Any]:
        return evaluate(ctx, jaxpr, consts, values)

    return jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(*args)


@rule("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
def custom_derivative(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """A function with a derivative rule of its own.

    Where its body uses the weight only in products and lookups, the body runs factored under autodiff, and
    the use says so. Otherwise (a straight-through quantiser, say) autodiff of the body could be wrong or
    zero: the weight is materialised outside, and the function keeps its rule.
    """
    jaxpr, consts = _closed(eqn.params["call_jaxpr"] if "call_jaxpr" in eqn.params else eqn.params["fun_jaxpr"])
    kind = eqn.primitive.name.removesuffix("_call")
    trial = replace(ctx, uses={})
    outs = jax.eval_shape(lambda values: evaluate(trial, jaxpr, consts, values), args)
    if any(isinstance(x, Weight) for x in outs) or any(u.how == "materialised" for u in trial.uses.values()):
        return f"enters a {kind} that does more than multiply it; the function keeps its own derivative rule"
    inside = replace(ctx, note=f"inside a {kind} whose derivative rule autodiff replaces")
    return evaluate(inside, jaxpr, consts, args)


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
    jaxpr, jaxpr_consts = _closed(eqn.params["jaxpr"])
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
