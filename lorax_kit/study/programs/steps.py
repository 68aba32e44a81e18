"""The programs of a pack of trials, as pure functions: `make_step`, mapped over the trial axis of the factors.

Base and (with a shared stream) batch are not mapped, so XLA computes what precedes the first adapted site once.
A trial's arithmetic is that of `lk.make_step` with its own rank, scale and rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lorax_kit.core.leaves import keep_rows
from lorax_kit.core.paths import Params
from lorax_kit.core.plan import Plan
from lorax_kit.problem import Problem
from lorax_kit.problem.evaluate import scored
from lorax_kit.problem.objective import draws, loss_scale, training_loss, with_state
from lorax_kit.study.design.study import Study
from lorax_kit.study.programs.forms import DEFAULT, Form
from lorax_kit.study.programs.optimiser import evaluated, transformation
from lorax_kit.study.programs.packing import Scalars
from lorax_kit.training.step import Info, State, make_step
from lorax_kit.transform.adapt import adapt


class Running(NamedTuple):
    """State of a pack; every leaf has a leading trial axis.

    Attributes:
      state: of `make_step`.
      alive: bool; False once a trial's loss or gradient was not finite. Its factors no longer change.
    """

    state: State
    alive: Array


def rate(study: Study, peak: Array | float) -> Callable[[Array], Array]:
    """The learning rate by step: linear warm-up, then the study's decay to zero."""

    def schedule(count: Array) -> Array:
        t = (count - study.warmup) / max(study.steps - study.warmup, 1)
        decay = {"constant": jnp.ones_like(t), "linear": 1 - t, "cosine": 0.5 * (1 + jnp.cos(jnp.pi * t))}
        grown = (count + 1) / max(study.warmup, 1)
        return peak * jnp.where(count < study.warmup, grown, decay[study.schedule])

    return schedule


def optimizer(
    study: Study, plan: Plan, peak: Array | float, form: Form = DEFAULT, scalars: Mapping[str, Any] | None = None
) -> optax.GradientTransformation:
    """The optimiser of one trial; `peak` and the scalars that it reads may be traced."""
    values = {"weight_decay": 0.0, "lr_ratio": 1.0} | dict(scalars or {})
    return transformation(study, plan, form.recipe, rate(study, peak), values)


class Programs(NamedTuple):
    """Functions of a pack, not yet compiled: `init(factors, scalars)`, `step(running, scalars, base, batch)`,
    `finish(running)` -> factors as they are measured and saved, `score(factors, scalars, base, batch)`."""

    init: Callable[[Any, Scalars], Running]
    step: Callable[[Running, Scalars, Params, Any], tuple[Running, Info]]
    finish: Callable[[Running], Any]
    score: Callable[[Any, Scalars, Params, Any], Any]


def programs(
    study: Study,
    problem: Problem,
    plan: Plan,
    trials: int,
    whole: Callable[[Any], Params] = lambda base: base,
    form: Form = DEFAULT,
    anew: Callable[[Any], Any] = lambda loss: loss,
) -> Programs:
    """The programs of a pack. With a stream per seed, `batch` holds one batch per stream.

    Args:
      trials: of the pack, side by side or slice after slice; more than one share the base's products.
      whole: makes the base of what the programs are given as `base`: its arrays, where it holds other leaves, too.
      anew: loss -> the loss whose backward pass makes the base again.
    """
    adapted = adapt(problem.apply, plan, trials=trials)
    training = training_loss(problem, plan, trials=trials, whole=whole)
    drops = any(site.dropout > 0 for site in plan.sites)

    def solo_init(factors: Any, scalars: Scalars) -> State:
        init, _ = make_step(lambda *_: None, optimizer(study, plan, scalars.lr, form, scalars.more), jit=False)
        return init(factors, scalars.key if draws(problem, plan) else None)

    def solo_step(running: Running, scalars: Scalars, base: Params, batch: Any) -> tuple[Running, Info]:
        own = {name: x for name, x in scalars.more.items() if name in form.recipe.loss}
        dropout = scalars.dropout if drops else None
        loss = anew(partial(training, scale=scalars.scale, dropout=dropout, scalars=own))
        tx = optimizer(study, plan, scalars.lr, form, scalars.more)
        scale = loss_scale(whole(base), plan)
        _, step = make_step(loss, tx, accumulate=form.accumulate, loss_scale=scale, jit=False)
        state, info = step(running.state, base, batch)
        state = with_state(state, info)
        if form.held:
            state = state._replace(factors=_held(state.factors, scalars.rows))
        state = jax.tree.map(lambda new, old: jnp.where(running.alive, new, old), state, running.state)
        return Running(state, running.alive & info.finite), info

    def solo_score(factors: Any, scalars: Scalars, base: Params, batch: Any) -> Any:
        outputs = replace(adapted, scale=scalars.scale)(whole(base), factors, batch)
        return scored(problem, outputs, batch)

    def init(factors: Any, scalars: Scalars) -> Running:
        return Running(jax.vmap(solo_init)(factors, scalars), jnp.ones(scalars.lr.shape, bool))

    def step(running: Running, scalars: Scalars, base: Params, batch: Any) -> tuple[Running, Info]:
        own = study.stream == "seed"
        if own:
            batch = jax.tree.map(lambda x: jnp.asarray(x)[scalars.stream], batch)
        running, info = jax.vmap(solo_step, in_axes=(0, 0, None, 0 if own else None))(running, scalars, base, batch)
        return running, info._replace(finite=running.alive)

    def finish(running: Running) -> Any:
        return jax.vmap(lambda state: evaluated(plan, form.recipe, state.opt_state, state.factors))(running.state)

    return Programs(init, step, finish, jax.vmap(solo_score, in_axes=(0, 0, None, None)))


def _held(factors: Any, rows: Mapping[str, Mapping[str, Array]]) -> Any:
    """The factors with zeros in the rows that a trial does not have."""
    return {
        path: leaves._replace(**{name: keep_rows(getattr(leaves, name), n) for name, n in rows.get(path, {}).items()})
        for path, leaves in factors.items()
    }
