"""The loss that training a problem differentiates, and the state that its training pass gives anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.core.leaves import FactorTree, FullLeaf, penalty
from lorax_kit.core.paths import Params, flatten
from lorax_kit.core.plan import Plan
from lorax_kit.problem.check import named_state, outputs_and_state
from lorax_kit.problem.evaluate import scored
from lorax_kit.problem.problem import Problem
from lorax_kit.problem.sums import sums_of
from lorax_kit.training.objective import Weighted
from lorax_kit.training.step import Info, State
from lorax_kit.transform.adapt import adapt

STATE = "state"

HALF_SCALE = 1024.0
"""Times the loss of which gradients are taken over parameters in float16: smaller ones would be lost."""


def loss_scale(base: Params, plan: Plan) -> float:
    """`lk.make_step`'s for a base: 1024 where an adapted parameter is float16, otherwise 1."""
    named = flatten(base)[0]
    return HALF_SCALE if any(named[site.path].dtype == jnp.float16 for site in plan.sites) else 1.0


def draws(problem: Problem, plan: Plan) -> bool:
    """Whether a training step draws random numbers: for the problem's own pass, or for dropout of the low-rank path."""
    return problem.train_apply is not None or any(site.dropout > 0 for site in plan.sites)


def training_loss(
    problem: Problem,
    plan: Plan,
    *,
    trials: int = 1,
    whole: Callable[[Any], Params] = lambda base: base,
    measured: bool = False,
    recompute: bool | str = True,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """The loss of adapted training, for `lk.make_step`.

    It is (base, factors, batch, key, scale, dropout, scalars) -> (loss, aux). The methods' own penalties are added. The
    aux holds the state that `train_apply` gave, path -> array.

    Args:
      trials: how many trials the loss will be mapped over, as for `lk.adapt`.
      whole: makes params of what is given as `base`.
      measured: add to the aux each metric that is a mean score, by name.
      recompute: as in `lk.adapt`.

    The loss takes `scale` and `dropout`, in place of the plan's, and `scalars`, keywords of the problem's own loss;
    each may be traced.
    """
    state = {leaf.path: leaf.dtype for leaf in plan.full if not leaf.trained}
    adapted = adapt(problem.train_apply or problem.apply, plan, trials=trials, recompute=recompute)
    in_pieces = problem.sums is not None and problem.train_apply is None
    summed = adapt(problem.sums, plan, trials=trials, recompute=recompute) if in_pieces else None  # type: ignore[arg-type]

    def mean_scores(sums: Mapping[str, Any]) -> dict[str, Any]:
        named = {m.name: m.of or m.name for m in problem.all_metrics[1:] if m.of_outputs is None}
        return {name: sums[of] for name, of in named.items() if isinstance(of, str) and sums[of].total.ndim == 0}

    def loss(
        base: Any,
        factors: FactorTree,
        batch: Any,
        key: Array | None = None,
        scale: Any = None,
        dropout: Any = None,
        scalars: Mapping[str, Any] | None = None,
    ) -> Any:
        new: dict[str, Array] = {}
        if summed is not None and not scalars:
            scores = replace(summed, scale=scale, dropout=dropout)(whole(base), factors, batch, dropout_key=key)
            sums = sums_of(scores, f"problem {problem.name!r}")
            means = mean_scores(sums) if measured else {}
            return _penalised(sums["loss"], penalty(plan, factors)), {STATE: new, **means}
        run = replace(adapted, scale=scale, dropout=dropout)
        if problem.train_apply is None:
            outputs = run(whole(base), factors, batch, dropout_key=key)
        else:
            assert key is not None, "a problem with a train_apply needs keys: init(factors, key)"
            train_key, mask = jax.random.split(key)
            outputs = run(whole(base), factors, batch, train_key, dropout_key=mask)
            if problem.state:
                outputs, new_state = outputs_and_state(problem, outputs)
                new = {path: x.astype(state[path]) for path, x in named_state(problem, new_state, state).items()}
        aux: dict[str, Any] = {STATE: new}
        if measured:
            aux |= mean_scores(scored(problem, outputs, batch)[0])
        return _penalised(problem.loss(outputs, batch, **(scalars or {})), penalty(plan, factors)), aux

    return loss


def _penalised(value: Any, extra: Any) -> Any:
    """A loss, and a penalty beside it that does not grow with the batch."""
    if isinstance(value, Weighted):
        return Weighted(value.total + extra * value.weight, value.weight)
    return value + extra


def with_state(state: State, info: Info) -> State:
    """The training's state with the model's own state after this step; after a step that failed, with the old one."""
    if not info.aux[STATE]:
        return state
    factors = dict(state.factors)
    for path, value in info.aux[STATE].items():
        before = factors[path].value
        factors[path] = FullLeaf(jnp.where(info.finite, value.astype(before.dtype), before))
    return state._replace(factors=factors)
