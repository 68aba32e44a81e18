"""Which primitives keep a parameter factored, by which rule; and what else their names say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorax_kit.transform.context import Context

Run = Callable[["Context", Any, list[Any]], "list[Any] | str"]
"""(ctx, equation, operands) -> outputs, or a reason (str) why the rule cannot keep the weight factored."""

Joint = Callable[["Context", list[Any], list[list[Any]]], "list[Any] | None"]
"""(ctx, equations, operands of each) -> outputs of all, or None where each should run alone."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a primitive is evaluated whose operands hold weights.

    Attributes:
      run: gives the outputs, or a reason why not.
      calls: whether it runs other functions: what enters them is not used yet.
      keeps: whether it says itself, by `Context.kept` and `Context.product`, what a recomputed block keeps.
      joint: runs several equations with the same other operand at once.
    """

    run: Run
    calls: bool = False
    keeps: bool = False
    joint: Joint | None = None


RULES: dict[str, Rule] = {}
"""Primitive name -> rule."""

INLINED = frozenset(("jit", "pjit", "closed_call", "core_call"))
"""Calls that are evaluated as if their equations stood in the function around them."""

REARRANGING = frozenset(
    (
        *("broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "expand_dims", "pcast", "pvary"),
        *("optimization_barrier", "reduce_precision", "reshape", "sharding_constraint", "slice", "split", "squeeze"),
        *("stack", "stop_gradient", "transpose", "unstack"),
    )
)
"""Primitives that move, cut, repeat or cast entries without mixing them: each row of the parameter still reads the
input that its axis names. Calibration relies on this."""

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

MOVED = frozenset(("reshard", "mesh_cast"))
"""Primitives that move an array to another mesh, or to another kind of its axes."""


def rule(*names: str, calls: bool = False, keeps: bool = False) -> Callable[[Run], Run]:
    """Register a rule under the names a primitive has had; `calls` and `keeps` as in `Rule`."""

    def register(run: Run) -> Run:
        RULES.update(dict.fromkeys(names, Rule(run=run, calls=calls, keeps=keeps)))
        return run

    return register


def joint(name: str) -> Callable[[Joint], Joint]:
    """Add to a rule how equations run that share an operand."""

    def register(run: Joint) -> Joint:
        RULES[name] = replace(RULES[name], joint=run)
        return run

    return register


def calls(name: str) -> bool:
    """Whether a primitive runs other functions, by a rule."""
    return name in RULES and RULES[name].calls
