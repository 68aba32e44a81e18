"""Evaluates a jaxpr in which some values are `Weight`s: one rule per primitive that can keep them factored.

A primitive without one is given the materialised weight, and the use is recorded with the reason. What no weight
touches is bound as it was traced, custom derivative rules included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.sharding import AxisType, reshard

from lorax_kit.placement import (
    DATA,
    FSDP,
    TRIAL,
    explicit_mesh,
    like,
    partitioned,
    partitioned_axes,
    replicated,
    varies,
)
from lorax_kit.transform.context import Context
from lorax_kit.transform.recompute import INLINED, Block, Keep, blocks, products, recomputed
from lorax_kit.transform.weight import Weight

REARRANGING = frozenset(
    (
        *("broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "expand_dims", "pcast", "pvary"),
        *("optimization_barrier", "reduce_precision", "reshape", "sharding_constraint", "slice", "split", "squeeze"),
        *("stack", "stop_gradient", "transpose", "unstack"),
    )
)
"""Primitives that move, cut, repeat or cast entries without mixing them: each row of the parameter still reads the
input that its axis names. Calibration relies on this."""


Rule = Callable[[Context, Any, list[Any]], list[Any] | str]
RULES: dict[str, Rule] = {}
"""Primitive name -> rule. A rule returns the outputs, or a reason (str) why it cannot keep the weight factored."""
CALLS: set[str] = set()
"""Primitives that run other functions: what enters them is not used yet."""
MOVES = frozenset(
    (
        *("broadcast_in_dim", "convert_element_type", "copy", "copy_p", "expand_dims", "neg", "reduce_precision"),
        *("reshape", "slice", "squeeze", "transpose", "jit", "pjit", "closed_call", "core_call", "remat2", "remat"),
        *("checkpoint", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "scan", "while", "cond"),
    )
)
"""Primitives that leave the rank of a parameter as it is, and multiply nothing with it.

A weight that holds the rows of many adapters takes them along; any other operation is given its own alone.
"""
KEEPS: set[str] = set()
"""Primitives whose rules say themselves, by `Context.kept` and `Context.product`, what a block keeps."""


def rule(*names: str, calls: bool = False, keeps: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule under the names a primitive has had; `calls` and `keeps` as in CALLS and KEEPS."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
            if calls:
                CALLS.add(name)
            if keeps:
                KEEPS.add(name)
        return function

    return register


MOVED = frozenset(("reshard", "mesh_cast"))
"""Primitives that move an array to another mesh, or to another kind of its axes."""


Joint = Callable[[Context, list[Any], list[list[Any]]], list[Any] | None]
JOINT: dict[str, Joint] = {}
"""Primitive name -> rule that runs several equations with the same other operand at once, or declines by None."""


def joint(name: str) -> Callable[[Joint], Joint]:
    """Register a rule for equations that share an operand."""

    def register(function: Joint) -> Joint:
        JOINT[name] = function
        return function

    return register


def materialise(ctx: Context, eqn: Any, args: Sequence[Any], reason: str) -> list[Any]:
    """Replace every weight among `args` by its sum, and record why."""
    out = []
    for i, x in enumerate(args):
        if isinstance(x, Weight):
            ctx.record(x, eqn, i, how="full" if x.trained_in_full else "materialised", reason=reason)
            x = partitioned(Weight.materialise, like(x.w), x)
        out.append(x)
    return out


def bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Run one equation as it was traced."""
    if any(True for _ in jex.jaxprs_in_params(eqn.params)):
        # Through a one-equation jaxpr: how a higher-order primitive wants its functions back has changed
        # between versions of JAX, and the public evaluator knows.
        jaxpr = jex.Jaxpr(
            constvars=(),
            invars=[v for v in eqn.invars if not isinstance(v, jex.Literal)],
            outvars=list(eqn.outvars),
            eqns=[eqn],
            effects=eqn.effects,
            debug_info=NO_DEBUG_INFO,
        )
        arrays = [x for v, x in zip(eqn.invars, args, strict=True) if not isinstance(v, jex.Literal)]
        return list(jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))(*arrays))
    params = eqn.params
    if (current := jax.sharding.get_abstract_mesh()).axis_types and AxisType.Explicit not in current.axis_types:
        # Traced with explicit axes, and run where the partitioner decides.
        params = {k: None if k in ("out_sharding", "sharding") and _explicit(x) else x for k, x in params.items()}
    out = eqn.primitive.bind(*args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _explicit(sharding: Any) -> bool:
    return AxisType.Explicit in (getattr(getattr(sharding, "mesh", None), "axis_types", None) or ())


NO_DEBUG_INFO = jex.DebugInfo("lorax_kit", "bind", (), ())


def evaluate(ctx: Context, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluate `jaxpr` on `args`, arrays or `Weight`s; outputs may be `Weight`s, too."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    if not ctx.recompute:
        _run(ctx, jaxpr.eqns, env, frozenset() if ctx.keep is None else products(jaxpr.eqns))
    else:
        given = set(env)
        parameters = {v for v, x in env.items() if isinstance(x, Weight)}
        for block in blocks(jaxpr, parameters, ctx.recompute == "everything"):
            if block.recomputed:
                _run_recomputed(ctx, block, env, given)
            else:
                _run(ctx, block.eqns, env, frozenset())
    return [v.val if isinstance(v, jex.Literal) else env[v] for v in jaxpr.outvars]


def _run_recomputed(ctx: Context, block: Block, env: dict[Any, Any], given: set[Any]) -> None:
    """Evaluate a block of which the backward pass keeps products and inputs only; its results go into `env`."""
    is_made = [v not in given and not isinstance(env[v], Weight) for v in block.reads]
    narrow = {v: ctx.narrow[v][0] for v in block.reads if v in ctx.narrow}

    trees: list[Any] = []  # of the results: a weight among them holds other functions each time

    def fn(keep: Keep, made: list[Any], held: tuple[list[Any], list[Any]]) -> list[Any]:
        queues = iter(made), iter(held[0])
        own = {v: next(queues[0] if m else queues[1]) for v, m in zip(block.reads, is_made, strict=True)}
        spread = {v: (shape, x) for (v, shape), x in zip(narrow.items(), held[1], strict=True)}
        _run(replace(ctx, recompute=False, keep=keep, narrow=spread), block.eqns, own, block.kept)
        leaves, tree = jax.tree.flatten([own[v] for v in block.writes])
        trees.append(tree)
        return leaves

    made = [env[v] for v, m in zip(block.reads, is_made, strict=True) if m]
    held = [env[v] for v, m in zip(block.reads, is_made, strict=True) if not m]
    out = recomputed(fn, made, (held, [ctx.narrow[v][1] for v in narrow]), ctx.recompute == "everything")
    env.update(zip(block.writes, jax.tree.unflatten(trees[-1], out), strict=True))


def _run(ctx: Context, eqns: Sequence[Any], env: dict[Any, Any], kept: frozenset[int]) -> None:
    """Run equations over `env`, those of `kept` by `ctx.keep`."""

    def read(v: Any) -> Any:
        return v.val if isinstance(v, jex.Literal) else env[v]

    def apply(eqn: Any, values: list[Any]) -> list[Any]:
        if eqn.primitive.name not in CALLS:
            values = [_watched(ctx, eqn, i, x) for i, x in enumerate(_masked(ctx, eqn, values))]
        weights = [x for x in values if isinstance(x, Weight)]
        if weights and ctx.explicit and eqn.primitive.name not in CALLS | MOVED and not weights[0].probe:
            return _partitioned(ctx, [eqn], lambda ctx, values: use(ctx, eqn, values), values)
        return use(ctx, eqn, values)

    def use(ctx: Context, eqn: Any, values: list[Any]) -> list[Any]:
        if any(isinstance(x, Weight) for x in values):
            if eqn.primitive.name not in MOVES:
                values = [x.chosen(*values) if isinstance(x, Weight) else x for x in values]
            known = RULES.get(eqn.primitive.name)
            found = known(ctx, eqn, values) if known else f"no low-rank rule for {eqn.primitive.name!r}"
            if isinstance(found, str):
                return bind(eqn, materialise(ctx, eqn, values, found))
            if ctx.tap is not None and eqn.primitive.name not in REARRANGING | CALLS:
                return [_altered(x, eqn.primitive.name) if isinstance(x, Weight) else x for x in found]
            return found
        if eqn.primitive.name == "broadcast_in_dim":
            ctx.narrow[eqn.outvars[0]] = _narrow(eqn, values[0])
        if eqn.primitive.name in ("pvary", "pcast"):
            ctx.said[eqn.outvars[0]] = varies(values[0])
        return bind(eqn, values)

    def run(eqn: Any) -> None:
        with _as_traced(eqn):
            run_here(eqn)

    def run_here(eqn: Any) -> None:
        values, name = [read(v) for v in eqn.invars], eqn.primitive.name
        by_rule = name in KEEPS and any(isinstance(x, Weight) for x in values)
        if id(eqn) in kept and name in INLINED:
            out = RULES[name](ctx, eqn, values)
        elif id(eqn) in kept and not by_rule:
            out = ctx.kept(lambda *values: apply(eqn, list(values)), *values)
        else:
            out = apply(eqn, values)
        env.update(zip(eqn.outvars, out, strict=True))

    def run_together(eqns: list[Any]) -> None:
        """Equations that share an operand, where each other operand is a weight by now, or can be."""
        ready = [eqn for eqn in eqns if all(_make_available(v, env, makers, run) for v in eqn.invars)]
        if len(ready) > 1 and all(sum(isinstance(read(v), Weight) for v in e.invars) == 1 for e in ready):
            with _as_traced(ready[0]):
                joint_rule, operands = JOINT[ready[0].primitive.name], [[read(v) for v in e.invars] for e in ready]
                if ctx.explicit:
                    found = _partitioned(ctx, ready, lambda ctx, args: joint_rule(ctx, ready, args), operands)
                else:
                    found = joint_rule(ctx, ready, operands)
            if found is not None:
                env.update(zip((eqn.outvars[0] for eqn in ready), found, strict=True))

    # Joined, matrices of which devices hold parts would move from one to another.
    apart = partitioned_axes() - {DATA, FSDP, TRIAL}
    groups, makers = {} if apart else _same_input(eqns), {v: eqn for eqn in eqns for v in eqn.outvars}
    for eqn in eqns:
        if id(eqn) in groups:
            run_together(groups.pop(id(eqn)))
        if not eqn.outvars or not all(v in env for v in eqn.outvars):  # without outputs: a print
            run(eqn)


def _partitioned(ctx: Context, eqns: list[Any], use: Callable[[Context, Any], Any], values: Any) -> Any:
    """What a rule gives without regard to explicit axes: results lie where the equations say, factors everywhere."""
    mesh = explicit_mesh(values)
    if mesh is None:
        return use(ctx, values)

    def run(values: Any, narrow: dict[Any, Any]) -> Any:
        shapes = {v: (ctx.narrow[v][0], x) for v, x in narrow.items()}
        return use(replace(ctx, narrow=shapes, explicit=False), values)

    def place(x: Any, v: Any) -> Any:
        where = v.aval.sharding
        where = replicated(mesh) if where.mesh.empty else where
        if not isinstance(x, Weight):
            return reshard(x, where)
        rest = replace(x, w=None)  # type: ignore[arg-type]  # None: no leaf
        rest = jax.tree.map(lambda leaf: reshard(leaf, replicated(mesh)), rest)
        return replace(rest, w=reshard(x.w, where))

    def placed(out: Any) -> Any:
        variables = [v for eqn in eqns for v in eqn.outvars]
        return None if out is None else [place(x, v) for x, v in zip(out, variables, strict=True)]

    known = {v for eqn in eqns for v in eqn.invars if not isinstance(v, jex.Literal) and v in ctx.narrow}
    return partitioned(run, placed, values, {v: ctx.narrow[v][1] for v in known})


@contextmanager
def _as_traced(eqn: Any) -> Iterator[None]:
    """The surroundings in which an equation was traced: device or host, kind of random numbers, mesh, named scopes."""
    scopes = str(eqn.source_info.name_stack)
    with eqn.ctx.manager, jax.named_scope(scopes) if scopes else nullcontext():
        yield


def _same_input(eqns: Sequence[Any]) -> dict[int, list[Any]]:
    """Equations that a joint rule may run at once, by the id of the first: they share an operand and all settings."""
    alike: dict[Any, list[Any]] = {}
    for eqn in eqns:
        if eqn.primitive.name in JOINT:
            for side, v in enumerate(eqn.invars):
                if not isinstance(v, jex.Literal):
                    alike.setdefault((v, side, eqn.ctx, str(eqn.params)), []).append(eqn)
    return {id(eqns[0]): eqns for eqns in alike.values() if len(eqns) > 1}


def _make_available(v: Any, env: dict[Any, Any], makers: dict[Any, Any], run: Callable[[Any], None]) -> bool:
    """Evaluate `v` early if it is only a cast or transpose of a parameter. Returns whether `v` is available."""
    if isinstance(v, jex.Literal) or v in env:
        return True
    eqn = makers.get(v)
    if eqn is None or eqn.primitive.name not in RULES or eqn.primitive.name in CALLS or len(eqn.invars) != 1:
        return False
    (source,) = eqn.invars
    if not _make_available(source, env, makers, run) or not isinstance(env.get(source), Weight):
        return False
    run(eqn)
    return True


def _watched(ctx: Context, eqn: Any, operand: int, x: Any) -> Any:
    """A parameter trained in full is an array to every operation; that it is used is noted."""
    if isinstance(x, Weight) and x.trained_in_full:
        ctx.record(x, eqn, operand, how="full")
        return x.base()
    return x


def _masked(ctx: Context, eqn: Any, values: list[Any]) -> list[Any]:
    """Operands, of which weights with dropout draw other masks on devices that hold other inputs."""
    if not any(isinstance(x, Weight) and x.key is not None for x in values):
        return values
    inputs = [(v, x) for v, x in zip(eqn.invars, values, strict=True) if not isinstance(x, Weight)]
    differs = [varies(x) if isinstance(v, jex.Literal) else ctx.said.get(v, varies(x)) for v, x in inputs]
    axes = frozenset().union(*differs)
    return [x.folded(axes) if isinstance(x, Weight) else x for x in values]


def _altered(weight: Weight, name: str) -> Weight:
    return replace(weight, parts=tuple(part._replace(altered=name) for part in weight.parts))


def _narrow(eqn: Any, x: Any) -> Any:
    """What `broadcast_in_dim` spreads, with axes of size 1 where it is spread: (shape, array)."""
    shape = [1] * len(eqn.params["shape"])
    for d, n in zip(eqn.params["broadcast_dimensions"], jnp.shape(x), strict=True):
        shape[d] = n
    return (tuple(shape), x)


def evaluate_arrays(ctx: Context, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """`evaluate`, with weights among the outputs materialised."""
    return materialise(ctx, "output", evaluate(ctx, jaxpr, consts, args), "returned as an array")


def closed(jaxpr: Any) -> tuple[Any, Any]:
    """A jaxpr of an equation's params, and its constants."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, jex.ClosedJaxpr) else (jaxpr, ())
