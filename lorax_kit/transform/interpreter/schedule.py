"""The order in which equations run: a pure function of them, without values."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex

from lorax_kit.transform.interpreter.registry import RULES


class Step(NamedTuple):
    """One equation, or several that a joint rule may run at once.

    Attributes:
      eqns: they share an operand, and all that they read is there.
      number: of the first, among the equations given to `schedule`.
      kept: whether a recomputed block keeps the results.
    """

    eqns: tuple[Any, ...]
    number: int
    kept: bool


def schedule(
    eqns: Sequence[Any], parameters: Collection[Any] = (), kept: Collection[int] = (), *, join: bool = True
) -> Iterator[Step]:
    """Every equation once, in the order given, but for products that share an operand.

    Those run where the first of them stood, if what else they read is there by then: computed, or a parameter that is
    only cast or transposed, which then happens before.

    Args:
      eqns: of a jaxpr, or of a part of it.
      parameters: variables that hold weights at the beginning.
      kept: ids of the equations that a block keeps.
      join: whether any run together.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> jaxpr = jax.make_jaxpr(lambda q, k, x: jnp.tanh(x @ q) + x @ k.T)(*jnp.ones((3, 4, 4))).jaxpr
      >>> [[eqn.primitive.name for eqn in step.eqns] for step in schedule(jaxpr.eqns, jaxpr.invars[:2])]
      [['transpose'], ['dot_general', 'dot_general'], ['tanh'], ['add']]
    """
    number = {id(eqn): i for i, eqn in enumerate(eqns)}
    maker = {v: eqn for eqn in eqns for v in eqn.outvars}
    moved = _parameters(eqns, parameters)
    groups = _same_input(eqns, moved) if join else {}
    done: set[int] = set()

    def step(*some: Any) -> Step:
        done.update(map(id, some))
        return Step(some, number[id(some[0])], id(some[0]) in kept)

    def pending(v: Any) -> list[Any] | None:
        """The equations that have to run before `v` is there, in order; None where it cannot be moved forward."""
        eqn = None if isinstance(v, jex.Literal) else maker.get(v)
        if eqn is None or id(eqn) in done:
            return []
        if v not in moved or len(eqn.invars) != 1 or (before := pending(eqn.invars[0])) is None:
            return None
        return [*before, eqn]

    for eqn in eqns:
        if id(eqn) in done:
            continue
        together, early = [], dict[int, Any]()
        for other in groups.get(id(eqn), ()):
            before = [pending(v) for v in other.invars]
            if id(other) not in done and all(some is not None for some in before):
                together.append(other)
                early.update({id(one): one for some in before for one in some or ()})
        if len(together) > 1:
            yield from (step(one) for one in early.values())
            yield step(*together)
        if id(eqn) not in done:
            yield step(eqn)


def _parameters(eqns: Sequence[Any], parameters: Collection[Any]) -> set[Any]:
    """Variables that hold parameters, in any layout, and nothing else."""
    held = set(parameters)
    for eqn in eqns:
        known = RULES.get(eqn.primitive.name)
        read = [v for v in eqn.invars if not isinstance(v, jex.Literal)]
        if known is not None and not known.calls and read and all(v in held for v in read):
            held.update(eqn.outvars)
    return held


def _same_input(eqns: Sequence[Any], parameters: Collection[Any]) -> dict[int, list[Any]]:
    """Equations that a joint rule may run at once, by the id of the first: they share settings, and an input.

    A parameter that several inputs are multiplied with is none.
    """
    alike: dict[Any, list[Any]] = {}
    for eqn in eqns:
        known = RULES.get(eqn.primitive.name)
        if known is not None and known.joint is not None:
            for side, v in enumerate(eqn.invars):
                if not isinstance(v, jex.Literal) and v not in parameters:
                    alike.setdefault((v, side, eqn.ctx, str(eqn.params)), []).append(eqn)
    return {id(group[0]): group for group in alike.values() if len(group) > 1}
