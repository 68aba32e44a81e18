"""Rules of the primitives that only carry a parameter on: layout, dtype, and calls of other functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax_kit.transform.interpret import Context, bind, closed, evaluate, rule
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


@rule("jit", "pjit", "closed_call", "core_call")
def call(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """A nested jit is inlined: the program around it is compiled anyway."""
    jaxpr, consts = closed(eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"])
    return evaluate(ctx, jaxpr, consts, args)


@rule("remat2", "remat", "checkpoint")
def checkpoint(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """Rematerialised under the same policy, with the low-rank products inside."""
    jaxpr, consts = closed(eqn.params["jaxpr"])

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
    jaxpr, consts = closed(eqn.params["call_jaxpr"] if "call_jaxpr" in eqn.params else eqn.params["fun_jaxpr"])
    kind = eqn.primitive.name.removesuffix("_call")
    trial = replace(ctx, uses={})
    outs = jax.eval_shape(lambda values: evaluate(trial, jaxpr, consts, values), args)
    if any(isinstance(x, Weight) for x in outs) or any(u.how == "materialised" for u in trial.uses.values()):
        return f"enters a {kind} that does more than multiply it; the function keeps its own derivative rule"
    inside = replace(ctx, note=f"inside a {kind} whose derivative rule autodiff replaces")
    return evaluate(inside, jaxpr, consts, args)
