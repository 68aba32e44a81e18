"""Cuts a program into blocks for the backward pass where little is alive: attention, then the feed-forward half."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax.extend.core as jex

from lorax_kit.transform.interpreter.registry import INLINED

CHEAP = frozenset(
    (
        *("abs", "add", "add_any", "and", "atan2", "cbrt", "ceil", "clamp", "convert_element_type", "cos", "cosh"),
        *("div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow"),
        *("is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow"),
        *("rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign"),
        *("sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor", "bitcast_convert_type"),
        *("reduce_precision", "copy", "broadcast_in_dim", "concatenate", "dynamic_slice", "expand_dims", "iota"),
        *("pad", "reshape", "rev", "slice", "split", "squeeze", "transpose", "reduce_and", "reduce_max"),
        *("reduce_min", "reduce_or", "reduce_sum"),
    )
)
"""Elementwise operations, layout changes and reductions: cheap beside a product of what they give."""

OWN_DERIVATIVE = frozenset(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"))
"""Functions with a derivative rule of their own."""


class Block(NamedTuple):
    """Consecutive equations of a jaxpr.

    Attributes:
      eqns: in order.
      kept: ids of those whose results are kept.
      reads, writes: variables from before, and those wanted later.
      recomputed: whether it is worth it: it has kept equations and others, and nothing that must run once.
    """

    eqns: list[Any]
    kept: frozenset[int]
    reads: list[Any]
    writes: list[Any]
    recomputed: bool


def _dear(eqn: Any) -> int:
    """0: cheap to recompute. 1: one expensive operation, keep its result. 2: never (several, loops, effects)."""
    if eqn.effects:
        return 2
    inner = [getattr(j, "jaxpr", j) for j in jex.jaxprs_in_params(eqn.params)]
    if not inner:
        return 0 if eqn.primitive.name in CHEAP else 1
    within = sum(_dear(e) for j in inner for e in j.eqns)
    if eqn.primitive.name not in INLINED | OWN_DERIVATIVE:
        return 2
    return within if within == 0 or eqn.primitive.name in INLINED else 2


def products(eqns: Sequence[Any]) -> frozenset[int]:
    """Ids of the equations that are kept: those that run one product, or another operation that is not cheap."""
    return frozenset(id(eqn) for eqn in eqns if _dear(eqn) == 1)


def blocks(jaxpr: Any, parameters: set[Any], everything: bool = False) -> list[Block]:
    """Cut a jaxpr where fewer bytes are alive than at the neighbouring places between two products.

    Args:
      jaxpr: to cut.
      parameters: variables that hold adapted parameters: alive throughout, and not counted.
      everything: a block runs all it holds again, functions with a derivative rule of their own among it.
    """
    eqns = list(jaxpr.eqns)
    dear = [_dear(eqn) for eqn in eqns]
    if everything:
        own_rule = [eqn.primitive.name in OWN_DERIVATIVE and not eqn.effects for eqn in eqns]
        dear = [min(cost, 1) if own else cost for cost, own in zip(dear, own_rule, strict=True)]
    born, dies, still = _lives(jaxpr, parameters)
    alive = [0] * (len(eqns) + 1)
    for v, i in born.items():
        for place in range(i + 1, dies.get(v, i) + 1):
            alive[place] += v.aval.size * v.aval.dtype.itemsize
    cuts = {0, len(eqns)}
    for i, cost in enumerate(dear):
        if cost > 1:
            cuts |= {i, i + 1}
    anchors = [i for i, cost in enumerate(dear) if cost]
    # Where few bytes are alive between an anchor and the next, and at both ends: (bytes, place before which to cut).
    # Never between those that read the same value (q, k and v), which may run as one.
    pairs = [(i, j) for i, j in pairwise(anchors) if not _read(eqns[i]) & _read(eqns[j]) - still]
    narrow = [min((alive[p], p) for p in range(i + 1, j + 1)) for i, j in pairs]
    narrow = [(0, 0), *narrow, (alive[-1], len(eqns))]
    for before, (size, place), behind in zip(narrow, narrow[1:], narrow[2:], strict=False):
        if size <= min(before[0], behind[0]):
            cuts.add(place)
    ends = sorted(cuts)
    return [_block(eqns, dear, dies, i, j) for i, j in pairwise(ends)]


def _read(eqn: Any) -> set[Any]:
    return {v for v in eqn.invars if not isinstance(v, jex.Literal)}


def _lives(jaxpr: Any, parameters: set[Any]) -> tuple[dict[Any, int], dict[Any, int], set[Any]]:
    """Computed variable -> its equation; variable -> the last that reads it; parameters in any layout, not computed."""
    still = set(parameters)
    born: dict[Any, int] = {}
    dies: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        read = _read(eqn)
        dies.update(dict.fromkeys(read, i))
        if read and read <= still:
            still.update(eqn.outvars)
        else:
            born.update(dict.fromkeys(eqn.outvars, i))
    dies.update({v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, jex.Literal)})
    return born, dies, still


def _block(eqns: list[Any], dear: list[int], dies: dict[Any, int], first: int, end: int) -> Block:
    inside = eqns[first:end]
    made = dict.fromkeys(v for eqn in inside for v in eqn.outvars)  # in order: programs are the same each time
    read = dict.fromkeys(v for eqn in inside for v in eqn.invars if not isinstance(v, jex.Literal))
    costs = dear[first:end]
    return Block(
        eqns=inside,
        kept=frozenset(id(eqn) for eqn, cost in zip(inside, costs, strict=True) if cost == 1),
        reads=[v for v in read if v not in made],
        writes=[v for v in made if dies.get(v, -1) >= end],
        recomputed=1 in costs and 0 in costs and max(costs) < 2,
    )
