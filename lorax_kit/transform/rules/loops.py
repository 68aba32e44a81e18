"""Rules of control flow: scan (layers scanned over a stacked parameter), while, cond and switch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax_kit.errors import PlanError
from lorax_kit.transform.base import Base
from lorax_kit.transform.context import Context
from lorax_kit.transform.interpreter.bind import closed
from lorax_kit.transform.interpreter.evaluate import evaluate, evaluate_arrays, materialise
from lorax_kit.transform.interpreter.registry import rule
from lorax_kit.transform.weight import Parameter, Probe, Weight


def _carried(args: Sequence[Any], jaxpr: Any, first: int, loop: str) -> list[bool]:
    """Which carried values are parameters that no step changes.

    Args:
      args: initial values of the carry.
      jaxpr: of the body, whose outputs start with the carry.
      first: the body's input that holds the first of them.

    Raises:
      PlanError: a parameter that the steps change.
    """
    held = []
    for i, x in enumerate(args):
        same = jaxpr.outvars[i] is jaxpr.invars[first + i]
        if isinstance(x, Parameter) and not same:
            paths = ", ".join(repr(part.path) for part in x.parts)
            raise PlanError(
                f"{paths} is carried through a {loop} that changes it, which no fixed low-rank update follows.\n"
                "  pass the parameter to the loop as a constant, or exclude it"
            )
        held.append(isinstance(x, Parameter))
    return held


def _moving(carry: Sequence[Any], held: list[bool]) -> list[Any]:
    """What a loop still carries: all but the held parameters."""
    return [x for h, x in zip(held, carry, strict=True) if not h]


def _whole(carry: Sequence[Any], held: list[bool], moving: Any) -> list[Any]:
    """The carry again, with `moving` in the places that are not held."""
    queue = iter(moving)
    return [x if h else next(queue) for h, x in zip(held, carry, strict=True)]


def _cut(weight: Parameter) -> tuple[tuple[dict[str, Any], Base | None], dict[str, Any]]:
    """A weight scanned over its leading dimension: ((arrays and base with that dimension first), what has none)."""
    n = weight.shape[0]
    base, fixed_base = weight.base.layers()
    scanned: dict[str, Any] = {}
    fixed: dict[str, Any] = {} if fixed_base is None else {"base": fixed_base}
    for name, (x, lead) in weight.arrays().items():
        if x.shape[lead] == n:
            scanned[name] = jnp.moveaxis(x, lead, 0)
        else:
            fixed[name] = jnp.squeeze(x, lead)
    if isinstance(weight, Weight) and weight.key is not None:
        scanned["key"] = jax.random.split(weight.key, n)
    if isinstance(weight, Probe):
        steps = jnp.arange(n)
        scanned["layer"] = steps if weight.layer is None else weight.layer * n + steps
    return (scanned, base), fixed


def _one_step(weight: Parameter, now: tuple[dict[str, Any], Base | None], fixed: dict[str, Any]) -> Parameter:
    """Inside the scan: one layer's weight, its leading dimension consumed."""
    arrays, base = now
    parts = tuple(part._replace(dims=part.dims[1:]) for part in weight.parts)
    return replace(weight, parts=parts, **{"base": base, **fixed, **arrays})


@rule("scan", calls=True)
def scan(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """Layers scanned over a stacked parameter, or a parameter that every step reads."""
    n_consts, n_carry = eqn.params["num_consts"], eqn.params["num_carry"]
    jaxpr, jaxpr_consts = closed(eqn.params["jaxpr"])
    consts, carry, xs = args[:n_consts], args[n_consts : n_consts + n_carry], args[n_consts + n_carry :]
    held = _carried(carry, jaxpr, n_consts, "scan")
    inside = replace(ctx, repeats=ctx.repeats * eqn.params["length"])
    pieces: list[tuple[Any, dict[str, Any]]] = [_cut(x) if isinstance(x, Parameter) else (x, {}) for x in xs]

    def body(moving: list[Any], slices: list[Any]) -> tuple[Any, Any]:
        layer = [
            _one_step(x, now, fixed) if isinstance(x, Parameter) else now
            for x, (_, fixed), now in zip(xs, pieces, slices, strict=True)
        ]
        out = evaluate(inside, jaxpr, jaxpr_consts, [*consts, *_whole(carry, held, moving), *layer])
        carried = _moving(out[:n_carry], held)
        reason = "returned as an array"
        return materialise(inside, "output", carried, reason), materialise(inside, "output", out[n_carry:], reason)

    options = {k: eqn.params[k] for k in ("reverse", "unroll", "_split_transpose") if k in eqn.params}
    scanned = [cut for cut, _ in pieces]
    moved, ys = lax.scan(body, _moving(carry, held), scanned, length=eqn.params["length"], **options)
    return [*_whole(carry, held, moved), *ys]


@rule("while", calls=True)
def while_(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """A loop of unknown length; the record counts its body once."""
    p = eqn.params
    n_test, n_body = p["cond_nconsts"], p["body_nconsts"]
    test_jaxpr, test_consts = closed(p["cond_jaxpr"])
    body_jaxpr, body_consts = closed(p["body_jaxpr"])
    of_test, of_body, carry = args[:n_test], args[n_test : n_test + n_body], args[n_test + n_body :]
    held = _carried(carry, body_jaxpr, n_body, "while loop")

    def test(moving: Any) -> Any:
        return evaluate_arrays(ctx, test_jaxpr, test_consts, [*of_test, *_whole(carry, held, moving)])[0]

    def body(moving: Any) -> Any:
        out = evaluate(ctx, body_jaxpr, body_consts, [*of_body, *_whole(carry, held, moving)])
        return materialise(ctx, "output", _moving(out, held), "returned as an array")

    return _whole(carry, held, lax.while_loop(test, body, _moving(carry, held)))


@rule("cond", calls=True)
def cond(ctx: Context, eqn: Any, args: list[Any]) -> list[Any]:
    """One of several branches; a parameter may be used in any of them."""

    def branch(jaxpr: Any) -> Any:
        inner, consts = closed(jaxpr)
        return lambda *values: evaluate_arrays(ctx, inner, consts, values)

    index, *values = args
    return list(lax.switch(index, [branch(j) for j in eqn.params["branches"]], *values))
