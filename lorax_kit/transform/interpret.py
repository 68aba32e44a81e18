"""Evaluates a jaxpr in which some values are `Weight`s: one rule per primitive that can keep them factored.

A primitive without a rule is given the materialised weight, and the use is recorded with the reason. What no
weight touches is bound as it was traced, custom derivative rules included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from math import prod
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from lorax_kit.core.plan import Axes
from lorax_kit.transform.cost import NONE, Costs, Product, choose, together
from lorax_kit.transform.kernels import KERNELS, Operands, Outputs
from lorax_kit.transform.recompute import INLINED, Block, Keep, blocks, products, recomputed
from lorax_kit.transform.weight import Weight

UNDROPPED = frozenset(("lookup", "materialised"))
"""How a parameter is used where no input meets it, so that its site's dropout has nothing to drop."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """One use of one adapted parameter.

    Attributes:
      path, primitive: which parameter, in which operation.
      how: "factored", "merged", "plain", "lookup" or "materialised".
      reason: why it runs that way.
      axes: what this use would have the parameter's axes be; None if it cannot say.
      product: sizes of the product, None for what is not one.
      repeats: how many times an enclosing scan runs it.
      note: what else the reader should know.
    """

    path: str
    primitive: str
    how: str
    reason: str
    axes: Axes | None = None
    product: Product | None = None
    repeats: int = 1
    note: str = ""


Tap = Callable[[Weight, tuple[tuple[int, ...], ...], Array, Partial], Array]
"""(weight, (contracted, free, stacked dimensions), value, inputs) -> value.

What watches the inputs of parameters while a plan is being resolved. `inputs(value)` are those of one use: floats
(*S, M, K), the contracted dimensions in the order of the parameter's axes, or the rows looked up, integers (M,).
"""


REARRANGING = frozenset(
    (
        *("broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "expand_dims", "pcast", "pvary"),
        *("optimization_barrier", "reduce_precision", "reshape", "sharding_constraint", "slice", "split", "squeeze"),
        *("stack", "stop_gradient", "transpose", "unstack"),
    )
)
"""Primitives after which the inputs of a parameter are what its axes say, or fewer or more of them."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the rules share.

    Attributes:
      kernel: the one wanted, or "auto".
      trials: how many stacked trials a surrounding vmap runs.
      compute_dtype: of the plan.
      costs: of the forms, for "auto".
      repeats, note: for the uses recorded next.
      uses: the record.
      narrow: variable -> (shape, array): what was broadcast to it, and its shape with axes of size 1 where it was.
      recompute: whether the backward pass forms elementwise results again instead of keeping them.
      keep: runs an equation whose results it keeps, within a block of which it recomputes the rest.
      tap: watches the inputs of parameters, or None.
    """

    kernel: str = "auto"
    trials: int = 1
    compute_dtype: str | None = None
    costs: Costs = NONE
    repeats: int = 1
    note: str = ""
    uses: dict[tuple[str, int, int], Use] = field(default_factory=dict)
    narrow: dict[Any, Any] = field(default_factory=dict)
    recompute: bool = False
    keep: Keep | None = None
    tap: Tap | None = None

    def record(
        self,
        weight: Weight,
        eqn: Any,
        operand: int,
        *,
        how: str,
        reason: str = "",
        dims: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
        product: Product | None = None,
    ) -> None:
        """Note a use of each of the weight's parts. A loop's body may be traced twice: the equation tells uses apart.

        Args:
          eqn: the equation, or a word for what is none.
          dims: the dimensions contracted and the free ones, where it is a product; it tells the plan's axes.
          product: of the whole weight; each part is given its share.
        """
        name = eqn if isinstance(eqn, str) else eqn.primitive.name
        total = sum(prod(part.shape) for part in weight.parts)
        undropped = "dropout has no input to act on here" if weight.key is not None and how in UNDROPPED else ""
        for part in weight.parts:
            share = None
            if product is not None:
                share = product._replace(outputs=product.outputs * prod(part.shape) // total)
                if len(weight.parts) > 1:
                    share = share._replace(rank=product.rank // len(weight.parts))
            table = part.as_table() if weight.probe and dims is None else None
            self.uses[part.path, id(eqn), operand] = Use(
                path=part.path,
                primitive=name,
                how="lookup" if table else how,
                reason=reason,
                axes=table if dims is None else part.axes(*dims),
                product=share,
                repeats=self.repeats,
                note="; ".join(filter(None, (undropped, self.note))),
            )

    def update_dtype(self, *operands: Array) -> Any:
        """What a low-rank update is computed in: the plan's dtype, or the one that holds all operands."""
        return jnp.dtype(self.compute_dtype or reduce(jnp.promote_types, (x.dtype for x in operands)))

    def select(self, product: Product) -> tuple[str, str]:
        """The kernel for a product, and why."""
        if self.kernel != "auto":
            return self.kernel, "asked for by adapt(kernel=...)"
        return choose(product, self.trials, self.costs)

    def kept(self, run: Callable[..., Any], *args: Any) -> Any:
        """`run(*args)`, whose result a block keeps."""
        return run(*args) if self.keep is None else self.keep.run(run, *args)

    def product(self, how: str, x: Any, sites: Operands, precision: Any) -> Outputs:
        """A kernel's outputs, which a block keeps."""
        kernel = KERNELS[how]
        return kernel.run(x, sites, precision) if self.keep is None else self.keep.product(kernel, precision, x, sites)

    def together(self, products: Sequence[Product]) -> bool:
        """Whether products with the same input run as one."""
        return self.kernel != "plain" and together(products, self.trials)


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
            x = x.materialise()
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
    out = eqn.primitive.bind(*args, **eqn.params)
    return list(out) if eqn.primitive.multiple_results else [out]


NO_DEBUG_INFO = jex.DebugInfo("lorax_kit", "bind", (), ())


def evaluate(ctx: Context, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluate `jaxpr` on `args`, arrays or `Weight`s; outputs may be `Weight`s, too."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    if not ctx.recompute:
        _run(ctx, jaxpr.eqns, env, frozenset() if ctx.keep is None else products(jaxpr.eqns))
    else:
        given = set(env)
        for block in blocks(jaxpr, {v for v, x in env.items() if isinstance(x, Weight)}):
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
    out = recomputed(fn, made, (held, [ctx.narrow[v][1] for v in narrow]))
    env.update(zip(block.writes, jax.tree.unflatten(trees[-1], out), strict=True))


def _run(ctx: Context, eqns: Sequence[Any], env: dict[Any, Any], kept: frozenset[int]) -> None:
    """Run equations over `env`, those of `kept` by `ctx.keep`."""

    def read(v: Any) -> Any:
        return v.val if isinstance(v, jex.Literal) else env[v]

    def apply(eqn: Any, values: list[Any]) -> list[Any]:
        if eqn.primitive.name not in CALLS:
            values = [_watched(ctx, eqn, i, x) for i, x in enumerate(values)]
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
        return bind(eqn, values)

    def run(eqn: Any) -> None:
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
        ready = [eqn for eqn in eqns if all(_weight_made(v, env, makers, run) for v in eqn.invars)]
        if len(ready) > 1 and all(sum(isinstance(read(v), Weight) for v in e.invars) == 1 for e in ready):
            found = JOINT[ready[0].primitive.name](ctx, ready, [[read(v) for v in e.invars] for e in ready])
            if found is not None:
                env.update(zip((eqn.outvars[0] for eqn in ready), found, strict=True))

    groups, makers = _same_input(eqns), {v: eqn for eqn in eqns for v in eqn.outvars}
    for eqn in eqns:
        if id(eqn) in groups:
            run_together(groups.pop(id(eqn)))
        if not eqn.outvars or not all(v in env for v in eqn.outvars):  # without outputs: a print
            run(eqn)


def _same_input(eqns: Sequence[Any]) -> dict[int, list[Any]]:
    """Equations that a joint rule may run at once, by the id of the first: they share an operand and all settings."""
    alike: dict[Any, list[Any]] = {}
    for eqn in eqns:
        if eqn.primitive.name in JOINT:
            for side, v in enumerate(eqn.invars):
                if not isinstance(v, jex.Literal):
                    alike.setdefault((v, side, str(eqn.params)), []).append(eqn)
    return {id(eqns[0]): eqns for eqns in alike.values() if len(eqns) > 1}


def _weight_made(v: Any, env: dict[Any, Any], makers: dict[Any, Any], run: Callable[[Any], None]) -> bool:
    """Whether a value is there, or was made just now out of a parameter (cast, transposed) ahead of its turn."""
    if isinstance(v, jex.Literal) or v in env:
        return True
    eqn = makers.get(v)
    if eqn is None or eqn.primitive.name not in RULES or eqn.primitive.name in CALLS or len(eqn.invars) != 1:
        return False
    (source,) = eqn.invars
    if not _weight_made(source, env, makers, run) or not isinstance(env.get(source), Weight):
        return False
    run(eqn)
    return True


def _watched(ctx: Context, eqn: Any, operand: int, x: Any) -> Any:
    """A parameter trained in full is an array to every operation; that it is used is noted."""
    if isinstance(x, Weight) and x.trained_in_full:
        ctx.record(x, eqn, operand, how="full")
        return x.w
    return x


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
