"""Runs one equation as it was traced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import jax.extend.core as jex
from jax.sharding import AxisType

NO_DEBUG_INFO = jex.DebugInfo("lorax_kit", "bind", (), ())


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


@contextmanager
def as_traced(eqn: Any) -> Iterator[None]:
    """The surroundings in which an equation was traced: device or host, kind of random numbers, mesh, named scopes."""
    scopes = str(eqn.source_info.name_stack)
    with eqn.ctx.manager, jax.named_scope(scopes) if scopes else nullcontext():
        yield


def closed(jaxpr: Any) -> tuple[Any, Any]:
    """A jaxpr of an equation's params, and its constants."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, jex.ClosedJaxpr) else (jaxpr, ())
