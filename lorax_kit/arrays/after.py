"""An order of computation that holds through compilation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np
from jax import Array, lax

from lorax_kit.arrays.placement import TRIAL, everywhere, explicit_mesh, partitioned, partitioned_axes


def after(x: Array, values: Any) -> Any:
    """Return `values` with every array made to depend on `x`, so that XLA cannot compute it earlier.

    Random keys and values that are not arrays pass through. Without the dependence XLA would form values of parameters
    alone (sums, restored weights) for all layers at the start, and would merge recomputation in the backward pass with
    the forward pass. On one device `lax.optimization_barrier` does not help: XLA's CPU backend drops it before
    scheduling. So we select on a condition that is never true but that XLA cannot fold (an entry is NaN and infinite).
    """
    if 0 in x.shape:  # of a weight that gains alone adapt: there is nothing to wait for
        return values
    if partitioned_axes() - {TRIAL}:  # each trial has its own entry
        return lax.optimization_barrier((x, values))[1]
    explicit = explicit_mesh(x) is not None
    entry = partitioned(_first, everywhere(x), x) if explicit else _first(x)
    infinite = lax.eq(lax.abs(entry), np.asarray(np.inf, entry.dtype))  # numpy's numbers are the fastest to trace
    never = lax.bitwise_and(lax.ne(entry, entry), infinite)

    def wait(value: Any) -> Any:
        if not isinstance(value, Array) or jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
            return value
        if explicit:
            return lax.select_n(never, value, lax.full_like(value, 0))
        return lax.select_n(never, value, lax.broadcast_in_dim(np.zeros((), value.dtype), value.shape, ()))

    return jax.tree.map(wait, values)


def _first(x: Array) -> Array:
    return lax.reshape(lax.slice(x, (0,) * x.ndim, (1,) * x.ndim), ())


def at_once(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays in which nothing waits: every `after` of its program gives its values as they are.

    For benchmarks, which ask what waiting is worth on a device. The program is traced with its derivatives in it, so
    give the whole training step; a derivative rule that is still to run would wait again.

    Example:
      >>> import jax.numpy as jnp
      >>> waiting = lambda x, y: after(x, y) + 1
      >>> waits(jax.make_jaxpr(waiting)(1.0, 2.0)), waits(jax.make_jaxpr(at_once(waiting))(1.0, 2.0))
      (1, 0)
    """

    def run(*args: Any) -> Any:
        closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
        program = jex.ClosedJaxpr(_without_waits(closed.jaxpr), closed.consts)
        return jax.tree.unflatten(jax.tree.structure(out), jex.jaxpr_as_fun(program)(*jax.tree.leaves(args)))

    return run


def waits(program: Any) -> int:
    """How many times a traced program (a jaxpr) lets values wait, in its inner programs, too."""
    jaxpr = getattr(program, "jaxpr", program)
    return len(_never(jaxpr)) + sum(waits(j) for eqn in jaxpr.eqns for j in jex.jaxprs_in_params(eqn.params))


def _never(jaxpr: Any) -> set[int]:
    """Ids of the equations in which `after` asks whether an entry is infinite and not a number."""
    source = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}

    def made_by(v: Any, primitive: str) -> Any:
        eqn = None if isinstance(v, jex.Literal) else source.get(v)
        return eqn if eqn is not None and eqn.primitive.name == primitive else None

    ids = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "and":
            different, infinite = made_by(eqn.invars[0], "ne"), made_by(eqn.invars[1], "eq")
            if different is None or infinite is None or different.invars[0] is not different.invars[1]:
                continue
            size = made_by(infinite.invars[0], "abs")
            if size is not None and size.invars[0] is different.invars[0]:
                ids.add(id(eqn))
    return ids


def _without_waits(jaxpr: Any) -> Any:
    never, eqns = _never(jaxpr), []
    no = jex.Literal(np.False_, jax.typeof(np.False_))
    for eqn in jaxpr.eqns:
        if id(eqn) in never:
            params = {"shape": eqn.outvars[0].aval.shape, "broadcast_dimensions": (), "sharding": None}
            eqn = eqn.replace(primitive=lax.broadcast_in_dim_p, invars=[no], params=params)
        elif any(True for _ in jex.jaxprs_in_params(eqn.params)):
            eqn = eqn.replace(params=jax.tree.map(_inner, dict(eqn.params), is_leaf=_is_param))
        eqns.append(eqn)
    return jaxpr.replace(eqns=eqns)


def _is_param(x: Any) -> bool:
    """Whether a parameter of an equation is one value, not a tuple of them (the branches of a cond)."""
    return not isinstance(x, Mapping | tuple | list)


def _inner(param: Any) -> Any:
    if isinstance(param, jex.ClosedJaxpr):
        return jex.ClosedJaxpr(_without_waits(param.jaxpr), param.consts)
    return _without_waits(param) if isinstance(param, jex.Jaxpr) else param
