"""The outer step: (state, base, tasks) -> (state, info), the mean over tasks moves the start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lorax_kit.core.leaves import FactorTree
from lorax_kit.core.paths import Params
from lorax_kit.errors import LoraxError
from lorax_kit.meta.inner import check_rates
from lorax_kit.meta.tasks import Meta
from lorax_kit.training import Info
from lorax_kit.training.objective import rows
from lorax_kit.training.optimisers.extra import check_transformation, started, updated


class MetaState(NamedTuple):
    """What meta-training carries: donated to the step, so use only the newest.

    Attributes:
      factors: the start of every task.
      rates: of the inner steps, from `inner_rates`.
      opt_state: of the optimiser of the factors.
      rate_state: of the optimiser of the rates, or None.
      step: int32 (), steps taken.
    """

    factors: Any
    rates: Any
    opt_state: Any
    rate_state: Any
    step: Array


MetaStep = Callable[[MetaState, Params, Any], tuple[MetaState, Info]]


def meta_step(
    meta: Meta,
    tx: optax.GradientTransformation,
    *,
    rate_tx: optax.GradientTransformation | None = None,
    jit: bool = True,
) -> tuple[Callable[[FactorTree, Any], MetaState], MetaStep]:
    """Build `(init, step)` of meta-training.

    Args:
      meta: `maml(...)`, `reptile(...)`, or any function of (base, factors, rates, task) that returns a `MetaGradient`.
      tx: moves the start: `lk.partition`, or any optax transformation over the factors.
      rate_tx: moves the logarithms of the inner rates, one for each leaf (after MAML++, arXiv 1810.09502, and Meta-SGD,
        arXiv 1707.09835, which learns one for each entry); a rate of 0 stays 0. None: they stay as they are.
      jit: compile the step, donating the state; the base and the tasks are never donated. False returns the plain
        function, to be wrapped.

    Returns:
      `init(factors, rates) -> MetaState` and `step(state, base, tasks) -> (MetaState, Info)`. Every array of `tasks`
      leads with an axis of tasks, over which the gradient of one task is vmapped; numbers reach every task as they are.
      `Info.loss` is the mean of `MetaGradient.loss`, `Info.aux` is {"inner": (steps,)}, the mean losses of the inner
      steps. As in `lk.make_step` a step whose numbers are not finite changes nothing; `Info.finite` tells. `lk.fit`
      reads such a state and info.

    Raises:
      LoraxError: when built, `tx` is no transformation; when called, rates that do not fit the factors, tasks without
        arrays or of several numbers, a loss that is not a float scalar, or `rate_tx` with a `meta` that has no
        gradient of the rates.

    Example:
      >>> from lorax_kit.core import FullLeaf
      >>> from lorax_kit.meta import Task, maml
      >>> loss = lambda base, f, x: (f["w"].value - x) ** 2
      >>> init, step = meta_step(maml(loss, steps=1), optax.sgd(0.5))
      >>> state = init({"w": FullLeaf(jnp.float32(4.0))}, {"w": FullLeaf(jnp.float32(0.25))})
      >>> centres = jnp.array([-1.0, 1.0])
      >>> state, info = step(state, None, Task(centres, centres))
      >>> float(state.factors["w"].value), float(info.loss)
      (3.0, 4.25)
    """
    check_transformation("tx", tx)
    if rate_tx is not None:
        check_transformation("rate_tx", rate_tx)

    def init(factors: FactorTree, rates: Any) -> MetaState:
        check_rates(factors, rates)
        # Copies, because the first step donates them.
        factors, rates = _copied(dict(factors)), _copied(rates)
        rate_state = None if rate_tx is None else _copied(started(rate_tx, _logarithms(rates)))
        return MetaState(factors, rates, _copied(started(tx, factors)), rate_state, jnp.zeros((), jnp.int32))

    def step(state: MetaState, base: Params, tasks: Any) -> tuple[MetaState, Info]:
        if not rows(tasks, "an axis of tasks"):
            raise LoraxError("there are no tasks: their arrays must lead with an axis of tasks, of at least 1.")
        axes = jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, tasks)
        of_task = jax.vmap(lambda task: meta(base, state.factors, state.rates, task), in_axes=(axes,))
        # In the dtype of each: the mean of one gradient per task, a few numbers each.
        gradient = jax.tree.map(lambda x: jnp.mean(x, axis=0), of_task(tasks))
        if rate_tx is not None and gradient.rates is None:
            raise LoraxError(
                "rate_tx would learn the inner rates, and this meta-gradient has none of them (Reptile).\n"
                "  use maml(...), or leave rate_tx out"
            )
        norm = optax.tree.norm(gradient.factors).astype(jnp.float32)
        extra = {"value": gradient.loss, "grad": gradient.factors}
        updates, opt_state = updated(tx, gradient.factors, state.opt_state, state.factors, extra)
        new = state._replace(factors=optax.apply_updates(state.factors, updates), opt_state=opt_state)
        if rate_tx is not None:
            by_log = jax.tree.map(jnp.multiply, state.rates, gradient.rates)
            updates, rate_state = updated(rate_tx, by_log, state.rate_state, _logarithms(state.rates), extra)
            rates = jax.tree.map(lambda rate, u: rate * jnp.exp(u), state.rates, updates)
            new = new._replace(rates=rates, rate_state=rate_state)
        finite = jnp.isfinite(gradient.loss) & jnp.isfinite(norm)
        finite = jax.tree.reduce(lambda ok, x: ok & jnp.all(jnp.isfinite(x)), (new.factors, new.rates), finite)
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
        return new._replace(step=state.step + 1), Info(gradient.loss, norm, finite, {"inner": gradient.inner})

    return init, jax.jit(step, donate_argnums=(0,)) if jit else step


def _logarithms(rates: Any) -> Any:
    """Of the rates; 0 for those of 0, which nothing moves."""
    return jax.tree.map(lambda rate: jnp.log(jnp.where(rate > 0, rate, 1)), rates)


def _copied(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)
