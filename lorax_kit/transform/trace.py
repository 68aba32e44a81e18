"""Traces a function of params once, and evaluates the trace with `Weight`s in place of adapted parameters."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lorax_kit.core.compact import LowRank, Quantised
from lorax_kit.core.errors import PlanError
from lorax_kit.core.paths import is_array, unflatten
from lorax_kit.transform import rules
from lorax_kit.transform.context import Context
from lorax_kit.transform.interpret import evaluate_arrays

NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def _not_traceable(error: Exception) -> str:
    """Where a function needs values that tracing does not have."""
    ours = tuple(os.path.dirname(os.path.abspath(module.__file__ or "")) for module in (jax, rules))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith((ours[0], os.path.dirname(ours[1]), "<"))] or frames
    at = theirs[-1]
    return (
        f"the function cannot be traced: it needs the value of an array, not its shape ({type(error).__name__}).\n"
        f"  {at.filename}, line {at.lineno}, in {at.name}: {at.line}\n"
        "  use jax.numpy and jax.lax instead of numpy and if, or pass what decides as a plain Python value"
    )


def run(
    ctx: Context,
    fn: Callable[..., Any],
    named: Mapping[str, Any],
    treedef: jax.tree_util.PyTreeDef,
    replaced: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """`fn(params, *args, **kwargs)`, with the params at `replaced` flowing through as `Weight`s.

    Array leaves are traced; every other leaf (flags, strings, activations) reaches `fn` as it is.
    """
    inputs, input_tree = jax.tree_util.tree_flatten((args, dict(kwargs)))
    traced_inputs = [i for i, x in enumerate(inputs) if is_array(x)]
    traced_names = [p for p, x in named.items() if is_array(x)]
    out_tree: list[jax.tree_util.PyTreeDef] = []

    def flat(params: list[Any], arrays: list[Any]) -> list[Any]:
        leaves = dict(named)
        leaves.update(zip(traced_names, params, strict=True))
        values = list(inputs)
        for i, x in zip(traced_inputs, arrays, strict=True):
            values[i] = x
        rebuilt_args, rebuilt_kwargs = jax.tree_util.tree_unflatten(input_tree, values)
        out, tree = jax.tree_util.tree_flatten(fn(unflatten(leaves, treedef), *rebuilt_args, **rebuilt_kwargs))
        out_tree.append(tree)
        return out

    params, arrays = [named[p] for p in traced_names], [inputs[i] for i in traced_inputs]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, Quantised | LowRank) else x for x in params]
    try:
        closed = jax.make_jaxpr(flat)(shapes, arrays)
    except NOT_TRACEABLE as e:
        raise PlanError(_not_traceable(e)) from e
    values = [replaced.get(p, x) for p, x in zip(traced_names, params, strict=True)]
    out = evaluate_arrays(ctx, closed.jaxpr, closed.consts, [*values, *arrays])
    return jax.tree_util.tree_unflatten(out_tree[-1], out)
