"""Rules of functions called by functions: jit, checkpoint, custom derivatives, shard_map."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jax.tree_util import Partial

from lorax_kit.arrays.placement import varies, varying
from lorax_kit.transform.base import combined
from lorax_kit.transform.context import Context
from lorax_kit.transform.interpreter.bind import bind, closed
from lorax_kit.transform.interpreter.evaluate import evaluate, evaluate_arrays
from lorax_kit.transform.interpreter.registry import rule
from lorax_kit.transform.weight import Parameter, Probe, Weight

_FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")


@rule("jit", "pjit", "closed_call", "core_call", calls=True)
def call(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """A nested jit is inlined: the program around it is compiled anyway."""
    jaxpr, consts = closed(eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"])
    return evaluate(ctx, jaxpr, consts, args)


@rule("remat2", "remat", "checkpoint", calls=True)
def checkpoint(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """Rematerialised under the same policy, with the low-rank products inside."""
    jaxpr, consts = closed(eqn.params["jaxpr"])

    def body(*values: Any) -> list[Any]:
        return evaluate(ctx, jaxpr, consts, values)

    return jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(*args)


@rule("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", calls=True)
def custom_derivative(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """A function with a derivative rule of its own, which it keeps: the weight is materialised outside.

    Autodiff of the body would be another derivative where the rule clips, rounds straight through or guards a zero,
    and nothing tells those from a plain product. While a plan is being resolved the body says which axes are
    contracted. Compressed parameters, which nothing restores, run in the body under autodiff, and the use says so; so
    do all in this package's own kernels, whose rules are autodiff's in another order.
    """
    jaxpr, consts = closed(eqn.params["call_jaxpr"] if "call_jaxpr" in eqn.params else eqn.params["fun_jaxpr"])
    kind = eqn.primitive.name.removesuffix("_call")
    probed = any(isinstance(x, Probe) for x in args)
    if ctx.restores and not probed and not _ours(jaxpr):
        return f"enters a {kind}, which keeps its own derivative rule"
    trial = replace(ctx, uses={}, tape=None, tap=None)
    outs = jax.eval_shape(lambda values: evaluate(trial, jaxpr, consts, values), args)
    if any(isinstance(x, Parameter) for x in outs) or any(u.how == "materialised" for u in trial.uses.values()):
        return f"enters a {kind} that does more than multiply it"
    inside = replace(ctx, note=f"inside a {kind} whose derivative rule autodiff replaces")
    return evaluate(inside, jaxpr, consts, args)


def _ours(jaxpr: Any) -> bool:
    """Whether a function is one of this folder's kernels, or a block that they run in."""
    return f" at {_FOLDER}" in str(getattr(jaxpr.debug_info, "func_src_info", ""))


@rule("shard_map", calls=True)
def shard_map(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """Per device, with the factors cut as their parameter is: along the dimensions that they vary with."""
    p = eqn.params
    jaxpr, consts = closed(p["jaxpr"])

    def spec_of(x: Any, spec: PartitionSpec) -> Any:
        if not isinstance(x, Parameter):
            return spec
        names = (*spec, *(None,) * (x.ndim - len(spec)))

        def cut(factor: Any, lead: int) -> Any:
            owned = x.owned(factor, lead)
            return PartitionSpec(*(None,) * lead, *(n if d in owned else None for d, n in enumerate(names)))

        whole: Any = jax.tree.map(lambda _: PartitionSpec(), x)
        cuts = {name: cut(factor, lead) for name, (factor, lead) in x.arrays().items()}
        return replace(whole, base=replace(whole.base, w=spec), **cuts)

    # Where types do not tell along which axes data vary, those count that split an array: devices draw other masks.
    split: set[str] = set()
    for x, spec in zip(args, p["in_specs"], strict=True):
        if not isinstance(x, Parameter) and not p["check_vma"]:
            split.update(name for names in spec for name in ((names,) if isinstance(names, str) else names or ()))

    def body(*values: Any) -> tuple[tuple[Any, ...], Any]:
        values = tuple(x.folded(frozenset(split)) if isinstance(x, Weight) else x for x in values)
        if ctx.shards is not None:
            ctx.shards.begin(p["check_vma"])
        out = tuple(evaluate_arrays(replace(ctx, recompute=False), jaxpr, consts, values))
        return out, () if ctx.shards is None else ctx.shards.end()

    args = [replace(x, base=combined(x.base.array(), [x.base])) if isinstance(x, Parameter) else x for x in args]
    mapped = jax.shard_map(
        body,
        mesh=p["mesh"],
        in_specs=tuple(spec_of(x, spec) for x, spec in zip(args, p["in_specs"], strict=True)),
        out_specs=(tuple(p["out_specs"]), PartitionSpec()),
        axis_names=set(p["newly_manual_axes"] if "newly_manual_axes" in p else p["manual_axes"]),
        check_vma=p["check_vma"],
    )
    out, seen = mapped(*args)
    if ctx.shards is not None:
        ctx.shards.add(seen)
    return list(out)


@rule("pvary", "pcast")
def pvary(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """Inside shard_map: a parameter that all devices share meets data that they do not."""
    (weight,) = args
    axes = varies(bind(eqn, [weight.base.array()])[0])  # the factors may have been told before
    return [weight.mapped(Partial(lambda w: bind(eqn, [w])[0]), lambda x, lead: varying(x, axes), lambda dims: dims)]
