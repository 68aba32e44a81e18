"""Gains are trained as what they moved by: weight decay pulls them to where they started, not to zero.

A magnitude of DoRA, or a gain of IA3, multiplies the whole weight; decay to zero would shrink the weight with it. What
an optimiser does besides depends on gradients and on differences of params alone, which are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from lorax_kit.core.leaves import FactorTree
from lorax_kit.core.method import method_of
from lorax_kit.core.plan import Plan


class FromStart(NamedTuple):
    """State of `from_start`.

    Attributes:
      start: path -> name of a gain -> its value when the optimiser was made.
      inner: state of the transformation.
    """

    start: Mapping[str, Mapping[str, Array]]
    inner: Any


def from_start(tx: optax.GradientTransformation, plan: Plan) -> optax.GradientTransformationExtraArgs:
    """`tx`, which sees the gains of `plan` (`Method.gains`) as deviations from where they started.

    The functions among extra arguments (`value_fn` of a line search) are given the params as they are.
    """
    gains = {site.path: names for site in plan.sites if (names := method_of(site.setting).gains)}
    wrapped = optax.with_extra_args_support(tx)
    if not gains:
        return wrapped

    def init(params: FactorTree) -> FromStart:
        # Copies: a step donates the params and the state.
        start: dict[str, dict[str, Array]] = {path: {} for path in gains}
        for path, names in gains.items():
            for name in sorted(names):
                x = getattr(params[path], name)
                if not (x is None or isinstance(x, optax.MaskedNode)):  # within another partition
                    start[path][name] = jnp.array(x, copy=True)
        return FromStart(start, wrapped.init(_shifted(params, start, -1)))

    def update(grads: Any, state: FromStart, params: Any = None, **extra: Any) -> tuple[Any, FromStart]:
        def whole(measure: Callable[..., Any]) -> Callable[..., Any]:
            return lambda moved, *rest, **named: measure(_shifted(moved, state.start, 1), *rest, **named)

        extra = {k: whole(x) if callable(x) else x for k, x in extra.items()}
        moved = None if params is None else _shifted(params, state.start, -1)
        updates, inner = wrapped.update(grads, state.inner, moved, **extra)
        return updates, FromStart(state.start, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _shifted(params: Any, start: Mapping[str, Mapping[str, Array]], sign: int) -> dict[str, Any]:
    """The params with `sign` times the start added to the gains."""
    return {
        path: leaves._replace(**{k: getattr(leaves, k) + sign * x for k, x in start.get(path, {}).items()})
        for path, leaves in params.items()
    }
