"""Evaluates a jaxpr in which some values are `Weight`s: one rule per primitive that can keep them factored.

A primitive without one is given the materialised weight, and the use is recorded with the reason. What no weight
touches is bound as it was traced, custom derivative rules included.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.sharding import reshard

from lorax_kit.arrays.placement import (
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
from lorax_kit.transform.base import Dense
from lorax_kit.transform.context import Context
from lorax_kit.transform.interpreter.bind import as_traced, bind
from lorax_kit.transform.interpreter.blocks import Block, blocks, products
from lorax_kit.transform.interpreter.recompute import recomputed
from lorax_kit.transform.interpreter.registry import INLINED, MOVED, MOVES, REARRANGING, RULES, calls
from lorax_kit.transform.interpreter.schedule import Step, schedule
from lorax_kit.transform.interpreter.tape import Tape
from lorax_kit.transform.weight import Parameter, Probe, Weight


def evaluate(ctx: Context, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluate `jaxpr` on `args`, arrays or `Weight`s; outputs may be `Weight`s, too."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    if not ctx.recompute:
        _run(ctx, jaxpr.eqns, env, () if ctx.tape is None else products(jaxpr.eqns))
    else:
        given = set(env)
        parameters = {v for v, x in env.items() if isinstance(x, Parameter)}
        for block in blocks(jaxpr, parameters, ctx.recompute == "everything"):
            if block.recomputed:
                _run_recomputed(ctx, block, env, given)
            else:
                _run(ctx, block.eqns, env)
    return [_read(env, v) for v in jaxpr.outvars]


def evaluate_arrays(ctx: Context, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """`evaluate`, with weights among the outputs materialised."""
    return materialise(ctx, "output", evaluate(ctx, jaxpr, consts, args), "returned as an array")


def materialise(ctx: Context, eqn: Any, args: Sequence[Any], reason: str) -> list[Any]:
    """Replace every weight among `args` by its sum, and record why."""
    out = []
    for i, x in enumerate(args):
        if isinstance(x, Parameter):
            how = "full" if isinstance(x, Probe) and x.full else "materialised"
            ctx.record(x, eqn, i, how=how, reason=reason)
            x = partitioned(type(x).materialise, like(jax.tree.leaves(x.base)[0]), x)
        out.append(x)
    return out


def _run(ctx: Context, eqns: Sequence[Any], env: dict[Any, Any], kept: Collection[int] = ()) -> None:
    """Run equations over `env`, those of `kept` by the tape."""
    parameters = {v for v, x in env.items() if isinstance(x, Parameter)}
    # Joined, matrices of which devices hold parts would move from one to another.
    join = not partitioned_axes() - {DATA, FSDP, TRIAL}
    for step in schedule(eqns, parameters, kept, join=join):
        here = _at(ctx, step)
        operands = [_operands(here, eqn, env) for eqn in step.eqns]
        outputs = _together(here, step.eqns, operands) if len(step.eqns) > 1 else None
        if outputs is None:
            outputs = []
            for eqn, values in zip(step.eqns, operands, strict=True):
                with as_traced(eqn):
                    outputs.append(_kept(here, eqn, values) if step.kept else _use(here, eqn, values))
        for eqn, values in zip(step.eqns, outputs, strict=True):
            env.update(zip(eqn.outvars, values, strict=True))


def _at(ctx: Context, step: Step) -> Context:
    """The context of a step: the tape at its place, and itself among the calls, if it is one."""
    if calls(step.eqns[0].primitive.name):
        ctx = replace(ctx, within=(*ctx.within, id(step.eqns[0])))
    return ctx if ctx.tape is None else replace(ctx, tape=ctx.tape.at(step.number))


def _run_recomputed(ctx: Context, block: Block, env: dict[Any, Any], given: set[Any]) -> None:
    """Evaluate a block of which the backward pass keeps products and inputs only; its results go into `env`."""
    is_made = [v not in given and not isinstance(env[v], Parameter) for v in block.reads]
    narrow = {v: ctx.narrow[v][0] for v in block.reads if v in ctx.narrow}

    trees: list[Any] = []  # of the results: a weight among them holds other functions each time

    def fn(tape: Tape, made: list[Any], held: tuple[list[Any], list[Any]]) -> list[Any]:
        queues = iter(made), iter(held[0])
        own = {v: next(queues[0] if m else queues[1]) for v, m in zip(block.reads, is_made, strict=True)}
        spread = {v: (shape, x) for (v, shape), x in zip(narrow.items(), held[1], strict=True)}
        _run(replace(ctx, recompute=False, tape=tape, narrow=spread), block.eqns, own, block.kept)
        leaves, tree = jax.tree.flatten([own[v] for v in block.writes])
        trees.append(tree)
        return leaves

    made = [env[v] for v, m in zip(block.reads, is_made, strict=True) if m]
    held = [env[v] for v, m in zip(block.reads, is_made, strict=True) if not m]
    out = recomputed(fn, made, (held, [ctx.narrow[v][1] for v in narrow]), ctx.recompute == "everything")
    env.update(zip(block.writes, jax.tree.unflatten(trees[-1], out), strict=True))


def _read(env: dict[Any, Any], v: Any) -> Any:
    return v.val if isinstance(v, jex.Literal) else env[v]


def _operands(ctx: Context, eqn: Any, env: dict[Any, Any]) -> list[Any]:
    """What an equation reads. A parameter trained in full is an array to every operation; that it is used is noted."""
    values = [_read(env, v) for v in eqn.invars]
    if calls(eqn.primitive.name):  # what enters them is not used yet
        return values
    for i, x in enumerate(values):
        if isinstance(x, Probe) and x.full:
            ctx.record(x, eqn, i, how="full")
            values[i] = x.base.array()
    return _masked(ctx, eqn, values)


def _masked(ctx: Context, eqn: Any, values: list[Any]) -> list[Any]:
    """Operands, of which weights with dropout draw other masks on devices that hold other inputs."""
    if not any(isinstance(x, Weight) and x.key is not None for x in values):
        return values
    inputs = [(v, x) for v, x in zip(eqn.invars, values, strict=True) if not isinstance(x, Parameter)]
    differs = [varies(x) if isinstance(v, jex.Literal) else ctx.said.get(v, varies(x)) for v, x in inputs]
    axes = frozenset().union(*differs)
    return [x.folded(axes) if isinstance(x, Weight) else x for x in values]


def _kept(ctx: Context, eqn: Any, values: list[Any]) -> list[Any]:
    """The outputs of an equation whose result a block keeps."""
    name = eqn.primitive.name
    if name in INLINED:  # the tape keeps what is inside
        out = RULES[name].run(ctx, eqn, values)
        assert not isinstance(out, str)
        return out
    if name in RULES and RULES[name].keeps and any(isinstance(x, Parameter) for x in values):
        return _use(ctx, eqn, values)
    return ctx.kept(lambda *values: _use(ctx, eqn, list(values)), *values)  # type: ignore[no-any-return]


def _use(ctx: Context, eqn: Any, values: list[Any]) -> list[Any]:
    """The outputs of an equation: by its rule where an operand is a weight, and otherwise as it was traced."""
    name = eqn.primitive.name
    if not any(isinstance(x, Parameter) for x in values):
        _note(ctx, eqn, values)
        return bind(eqn, values)
    if ctx.explicit and not calls(name) and name not in MOVED:
        return _partitioned(ctx, [eqn], lambda ctx, values: _use(ctx, eqn, values), values)
    if name not in MOVES:
        values = [x.chosen(*values) if isinstance(x, Weight) else x for x in values]
    out = RULES[name].run(ctx, eqn, values) if name in RULES else f"no low-rank rule for {name!r}"
    if isinstance(out, str):
        return bind(eqn, materialise(ctx, eqn, values, out))
    if ctx.tap is not None and name not in REARRANGING and not calls(name):
        return [_altered(x, name) if isinstance(x, Parameter) else x for x in out]
    return out


def _together(ctx: Context, eqns: Sequence[Any], operands: list[list[Any]]) -> list[list[Any]] | None:
    """The outputs of equations that share an input, where each other operand is a weight; None: each runs alone."""
    joint = RULES[eqns[0].primitive.name].joint
    assert joint is not None
    inputs = {id(x) for values in operands for x in values if not isinstance(x, Parameter)}
    if len(inputs) > 1 or not all(sum(isinstance(x, Parameter) for x in values) == 1 for values in operands):
        return None
    with as_traced(eqns[0]):
        if ctx.explicit:
            out = _partitioned(ctx, eqns, lambda ctx, operands: joint(ctx, list(eqns), operands), operands)
        else:
            out = joint(ctx, list(eqns), operands)
    return None if out is None else [[x] for x in out]


def _note(ctx: Context, eqn: Any, values: list[Any]) -> None:
    """Note what the rules read of an equation that no weight enters: what is spread, or told to vary by device."""
    if eqn.primitive.name == "broadcast_in_dim":
        ctx.narrow[eqn.outvars[0]] = _narrow(eqn, values[0])
    if eqn.primitive.name in ("pvary", "pcast"):
        ctx.said[eqn.outvars[0]] = varies(values[0])


def _altered(weight: Parameter, name: str) -> Parameter:
    return replace(weight, parts=tuple(part._replace(altered=name) for part in weight.parts))


def _narrow(eqn: Any, x: Any) -> Any:
    """What `broadcast_in_dim` spreads, with axes of size 1 where it is spread: (shape, array)."""
    shape = [1] * len(eqn.params["shape"])
    for d, n in zip(eqn.params["broadcast_dimensions"], jnp.shape(x), strict=True):
        shape[d] = n
    return (tuple(shape), x)


def _partitioned(ctx: Context, eqns: Sequence[Any], use: Callable[[Context, Any], Any], values: Any) -> Any:
    """What a rule gives without regard to explicit axes: results lie where the equations say, factors everywhere."""
    mesh = explicit_mesh(values)
    if mesh is None:
        return use(replace(ctx, explicit=False), values)

    def run(values: Any, narrow: dict[Any, Any]) -> Any:
        shapes = {v: (ctx.narrow[v][0], x) for v, x in narrow.items()}
        return use(replace(ctx, narrow=shapes, explicit=False), values)

    def place(x: Any, v: Any) -> Any:
        where = v.aval.sharding
        where = replicated(mesh) if where.mesh.empty else where
        if not isinstance(x, Parameter):
            return reshard(x, where)
        rest = replace(x, base=None)  # type: ignore[arg-type]  # None: no leaf
        rest = jax.tree.map(lambda leaf: reshard(leaf, replicated(mesh)), rest)
        where = where if isinstance(x.base, Dense) else replicated(mesh)
        return replace(rest, base=jax.tree.map(lambda leaf: reshard(leaf, where), x.base))

    def placed(out: Any) -> Any:
        variables = [v for eqn in eqns for v in eqn.outvars]
        return None if out is None else [place(x, v) for x, v in zip(out, variables, strict=True)]

    known = {v for eqn in eqns for v in eqn.invars if not isinstance(v, jex.Literal) and v in ctx.narrow}
    return partitioned(run, placed, values, {v: ctx.narrow[v][1] for v in known})
