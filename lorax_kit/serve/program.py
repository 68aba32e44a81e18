"""A function of params and inputs as one closed program, which the formats of deployment translate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from lorax_kit.core.paths import Params, flatten, is_array, unflatten
from lorax_kit.errors import ExportError

HOST = frozenset(("pure_callback", "io_callback", "debug_callback", "debug_print"))
"""Operations that call back into this process: no file holds what they call."""


class Program(NamedTuple):
    """What an exported file does.

    Attributes:
      run: `run(*arrays)`, a list of arrays; the params are constants of it.
      inputs: name -> shape and dtype, sizes symbolic where they vary.
      outputs: how many.
      operations: names of its primitives, those of inner functions, too.
    """

    run: Callable[..., list[Any]]
    inputs: dict[str, jax.ShapeDtypeStruct]
    outputs: int
    operations: frozenset[str]


def program(fn: Callable[..., Any], params: Params, inputs: Mapping[str, Any]) -> Program:
    """Trace `fn(params, *inputs.values())` once.

    Args:
      fn: traceable by JAX; its outputs are arrays, or a pytree of them.
      params: a pytree; compact leaves need an `fn` of `lk.compress.compressed`.
      inputs: name -> array or `jax.ShapeDtypeStruct`. `jax.export.symbolic_args_specs(inputs, "batch, length")` makes
        sizes that may vary.

    Raises:
      ExportError: inputs that are no arrays, a function that cannot be traced for them, or that calls back to Python.
    """
    if not inputs:
        raise ExportError("there are no inputs: name them, such as {'x': jax.ShapeDtypeStruct((1, 4), 'float32')}.")
    for name, x in inputs.items():
        if not is_array(x):
            raise ExportError(f"the input {name!r} is a {type(x).__name__}; it must be an array or its shape.")
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in inputs.items()}
    try:
        closed = jax.make_jaxpr(lambda *arrays: jax.tree.leaves(fn(params, *arrays)))(*shapes.values())
    except Exception as e:  # the function is the caller's: it may raise anything
        shown = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in shapes.items())
        raise ExportError(
            f"the function cannot be traced for the inputs {shown}: {first_line(e)}.\n"
            "  if sizes are symbolic, give the one it needs as a number"
        ) from e
    closed = closed.replace(jaxpr=_needed(closed.jaxpr))
    operations = frozenset(_operations(closed.jaxpr))
    if callbacks := sorted(HOST & operations):
        raise ExportError(
            f"the function uses {callbacks[0]!r}, which calls back into Python: no exported file can hold it.\n"
            "  leave it out of the function that you export"
        )
    return Program(jex.jaxpr_as_fun(closed), shapes, len(closed.jaxpr.outvars), operations)


def parameters_read(fn: Callable[..., Any], params: Params, inputs: Mapping[str, Any]) -> set[str]:
    """Paths of the parameters that the outputs of `fn(params, *inputs.values())` depend on."""
    named, treedef = flatten(params)
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in named.items()}
    closed = jax.make_jaxpr(lambda named, *arrays: jax.tree.leaves(fn(unflatten(named, treedef), *arrays)))(
        shapes, *inputs.values()
    )
    jaxpr = _needed(closed.jaxpr)
    read = set(_variables(jaxpr.outvars)).union(*(_variables(eqn.invars) for eqn in jaxpr.eqns))
    return {path for path, x in zip(sorted(shapes), jaxpr.invars, strict=False) if x in read}


def _needed(jaxpr: Any) -> Any:
    """Without equations that no output needs: XLA drops them, converters translate them, or fail (a layer's keys)."""
    wanted, kept = set(_variables(jaxpr.outvars)), []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not wanted.isdisjoint(eqn.outvars):
            wanted |= set(_variables(eqn.invars))
            kept.append(eqn.replace(params={name: _inner(x) for name, x in eqn.params.items()}))
    return jaxpr.replace(eqns=kept[::-1])


def _variables(atoms: Any) -> Iterator[Any]:
    return (x for x in atoms if isinstance(x, jex.Var))


def _inner(x: Any) -> Any:
    """A parameter of an equation, its functions without what they do not need."""
    if isinstance(x, jex.ClosedJaxpr):
        return x.replace(jaxpr=_needed(x.jaxpr))
    if isinstance(x, jex.Jaxpr):
        return _needed(x)
    return type(x)(map(_inner, x)) if type(x) in (tuple, list) else x


def _operations(jaxpr: Any) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from _operations(inner)


def first_line(e: Exception) -> str:
    """What an error says, in one line without its full stop."""
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0][:200].rstrip('. ')}" if lines else type(e).__name__
