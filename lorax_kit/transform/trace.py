"""Traces a function of params once, and evaluates the trace with `Weight`s in place of adapted parameters.

`run` is what `adapt`, `resolve` and `compressed` stand on; `watch` shows what the parameters are multiplied with.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.arrays.placement import explicit_mesh
from lorax_kit.core.lowrank import LowRank, dense
from lorax_kit.core.paths import Params, flatten, is_array, unflatten
from lorax_kit.core.plan import Plan
from lorax_kit.core.quantised import Quantised
from lorax_kit.core.site import Site
from lorax_kit.errors import PlanError
from lorax_kit.transform import rules
from lorax_kit.transform.base import Dense
from lorax_kit.transform.context import Context, Shards
from lorax_kit.transform.interpreter.evaluate import evaluate, materialise
from lorax_kit.transform.weight import Part, Probe, whole

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
    if explicit_mesh((values, arrays)) is not None:
        # What is formed again would have to be told where it lies: activations are kept instead.
        probed = any(isinstance(x, Probe) for x in values)  # they run as they were traced
        ctx = replace(ctx, explicit=not probed, recompute=False)
    out = evaluate(ctx, closed.jaxpr, closed.consts, [*values, *arrays])
    out = materialise(ctx, "output", out, "returned as an array")
    return jax.tree_util.tree_unflatten(out_tree[-1], out)


class Given(NamedTuple):
    """What a site is given in one use; traced values.

    Attributes:
      inputs: floats (*S, M, K), S stacked matrices with M inputs of K numbers each; of a lookup rows, integers (M,).
      layer: () int32 where the inputs are (M, K), of one of the stacked matrices alone; None otherwise.
      value: the operand as the function has it; of a lookup, its result.
      arrange: `value`, or another array of its shape, -> what lies in the places of `inputs`.
      differs: the mapped axes of devices along which the inputs differ.
    """

    inputs: Array
    layer: Array | None
    value: Array
    arrange: Callable[[Array], Array]
    differs: frozenset[str] = frozenset()


Sink = Callable[[Site, Given], None]
"""Is shown each use of a site."""


def watch(
    fn: Callable[..., Any],
    plan: Plan,
    sink: Sink,
    missed: Callable[[Site, str], None] | None = None,
    shards: Shards | None = None,
) -> Callable[..., Any]:
    """The same function, which also shows the inputs of each site to `sink`, in whatever scan or branch they arise.

    Inputs are traced values: a sink adds them to a `jax.Ref`, or sends them out by `jax.debug.callback`.

    Args:
      fn: `fn(params, *inputs, **kwargs)`, traceable by JAX; it is not changed.
      plan: from `lk.resolve`; which parameters, and what their inputs are. Ranks do not matter.
      sink: called once for each use of a site, while the function is being traced.
      missed: called with the site and the reason for each use whose inputs are not those of the site.
      shards: for a sink that may be called within `shard_map`, with the inputs of one device; None: uses there are
        missed.

    Returns:
      `run(params, *inputs, **kwargs)`, which returns what `fn` returns. Params may be `Quantised`.

    Example:
      >>> import lorax_kit as lk
      >>> fn, params, x = lambda p, x: jnp.tanh(x @ p["w"]), {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params, fn, x)
      >>> watch(fn, plan, lambda site, given: print(site.path, given.inputs.shape))(params, x).shape
      w (4, 3)
      (4, 2)
    """
    sites = {site.path: site for site in plan.sites}

    def tap(
        weight: Probe,
        dims: tuple[tuple[int, ...], ...],
        x: Array,
        arrange: Callable[[Array], Array],
        differs: frozenset[str],
    ) -> Array:
        for part in weight.parts:
            site = sites[part.path]
            why = _not_of_the_site(site, part, weight, dims, shards is not None)
            if not why:
                given = Given(arrange(x), weight.layer, x, arrange, differs)
                rows = jnp.issubdtype(given.inputs.dtype, jnp.integer) and given.inputs.ndim == 1
                if rows == site.lookup:
                    sink(site, given)
                else:
                    why = "its rows are looked up in one place, and multiplied in another"
            if why and missed is not None:
                missed(site, why)
        return x

    def watched(params: Params, *args: Any, **kwargs: Any) -> Any:
        named, treedef = flatten(params)
        probes = {p: Probe(parts=(whole(p, site.shape),), base=Dense(dense(named[p]))) for p, site in sites.items()}
        return run(Context(tap=tap, shards=shards), fn, named, treedef, probes, args, kwargs)

    return watched


def _not_of_the_site(site: Site, part: Part, weight: Probe, dims: tuple[tuple[int, ...], ...], in_shards: bool) -> str:
    """Why the inputs of a use are not those of the site; "" where they are."""
    contract, free, stack = dims
    axes = part.axes(contract, free)
    sizes = [prod(weight.shape[d] for d in some) for some in (contract, stack)]
    if part.altered:
        return f"it goes through {part.altered!r} before it is multiplied"
    mapped = bool(jax.sharding.get_abstract_mesh().manual_axes)
    if mapped and not in_shards:  # JAX lets no mutable array in
        return "it is used inside shard_map; calibrate the function of one device"
    if axes is None or axes.inputs != site.axes.inputs:
        return "it is multiplied along other axes than the plan's inputs"
    if sizes == [prod(site.in_shape), 1] and weight.layer is not None:
        return ""
    if mapped and sizes != [prod(site.in_shape), prod(site.stack_shape)]:
        return "a device of a shard_map holds a part of its inputs; calibrate the function of one device"
    if sizes != [prod(site.in_shape), prod(site.stack_shape)]:
        return "a part of it is used alone, as a slice, or a layer picked by its index"
    return ""
