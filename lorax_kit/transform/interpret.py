"""Evaluates a jaxpr in which some values are `Weight`s: one rule per primitive that can keep them factored.

A primitive without a rule is given the materialised weight, and the use is recorded with the reason. What no
weight touches is bound as it was traced, custom derivative rules included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.extend.core as jex

from lorax_kit.core.plan import Axes
from lorax_kit.transform.cost import Product, choose
from lorax_kit.transform.weight import Weight


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


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the rules share: the kernel wanted, the number of stacked trials, and the record of uses."""

    kernel: str = "auto"
    trials: int = 1
    compute_dtype: str | None = None
    repeats: int = 1
    note: str = ""
    uses: dict[tuple[str, int, int], Use] = field(default_factory=dict)

    def record(self, weight: Weight, eqn: Any, operand: int, **use: Any) -> None:
        """Note a use. A scan body may be traced several times: the equation tells uses apart."""
        key = (weight.path, id(eqn), operand)
        name = eqn if isinstance(eqn, str) else eqn.primitive.name
        self.uses[key] = Use(path=weight.path, primitive=name, repeats=self.repeats, note=self.note, **use)

    def select(self, product: Product) -> tuple[str, str]:
        """The kernel for a product, and why."""
        if self.kernel != "auto":
            return self.kernel, "asked for by adapt(kernel=...)"
        return choose(product, self.trials)


Rule = Callable[[Context, Any, list[Any]], list[Any] | str]
RULES: dict[str, Rule] = {}
"""Primitive name -> rule. A rule returns the outputs, or a reason (str) why it cannot keep the weight factored."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under the names a primitive has had."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def materialise(ctx: Context, eqn: Any, args: Sequence[Any], reason: str) -> list[Any]:
    """Replace every weight among `args` by its sum, and record why."""
    out = []
    for i, x in enumerate(args):
        if isinstance(x, Weight):
            ctx.record(x, eqn, i, how="materialised", reason=reason)
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

    def read(v: Any) -> Any:
        return v.val if isinstance(v, jex.Literal) else env[v]

    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        if any(isinstance(x, Weight) for x in values):
            apply = RULES.get(eqn.primitive.name)
            found = apply(ctx, eqn, values) if apply else f"no low-rank rule for {eqn.primitive.name!r}"
            out = bind(eqn, materialise(ctx, eqn, values, found)) if isinstance(found, str) else found
        else:
            out = bind(eqn, values)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def evaluate_arrays(ctx: Context, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """`evaluate`, with weights among the outputs materialised."""
    return materialise(ctx, "output", evaluate(ctx, jaxpr, consts, args), "returned as an array")


def closed(jaxpr: Any) -> tuple[Any, Any]:
    """A jaxpr of an equation's params, and its constants."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, jex.ClosedJaxpr) else (jaxpr, ())
