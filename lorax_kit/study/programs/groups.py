"""Groups of trials that fit the memory: what a pack needs is estimated before anything is compiled."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lorax_kit.core.paths import Params, nbytes
from lorax_kit.core.plan import Plan
from lorax_kit.errors import StudyError
from lorax_kit.problem import Problem
from lorax_kit.problem.check import told_in_words
from lorax_kit.problem.objective import training_loss
from lorax_kit.study.design.study import Study
from lorax_kit.study.design.trial import Trial
from lorax_kit.study.programs.forms import Form, Stack
from lorax_kit.study.programs.packing import pack
from lorax_kit.study.programs.slices import Layout, laid_out
from lorax_kit.study.programs.steps import programs
from lorax_kit.training.objective import Weighted

CACHED = {"cpu": 40 * 2**20}
"""Bytes that trials side by side are to need at most, by backend: where they outgrow the caches, each takes longer."""


class Group(NamedTuple):
    """Trials that train together.

    Attributes:
      trials: at most `layout.size` of them; a smaller group is filled up with copies that are discarded.
      layout: of the pack, the same for all groups of a kind, so that they share one compiled program.
      plan: of all their sites, at the highest rank.
      form: what its program is compiled for.
      estimated_bytes: of one training step beyond the base, per device.
    """

    trials: list[Trial]
    layout: Layout
    plan: Plan
    form: Form
    estimated_bytes: int

    @property
    def size(self) -> int:
        """Places of the pack."""
        return self.layout.size


def grouped(
    study: Study,
    problem: Problem,
    stack: Stack,
    params: Params,
    batch: Any,
    *,
    budget: int,
    devices: int = 1,
    parts: int = 1,
    earlier: tuple[int, int | None] | None = None,
) -> list[Group]:
    """Equal groups of one kind of trials, from the memory that one and two stacked trials need.

    Args:
      budget: bytes per device.
      parts: how many groups there are to be at least, where there are trials for them.
      earlier: (size, at_once) of an earlier session, None for all at once: kept if it still fits, so that going on
        gives the same bits.

    Raises:
      StudyError: not even one trial fits the budget.
    """
    trials, plan, form = stack
    check_step(study, problem, stack, params, batch)
    one, two = (pack_bytes(study, problem, stack, params, batch, n) for n in (1, 2))
    needs = Needs(one, max(two - one, 1), held_bytes(study, problem, stack, params))
    cached = CACHED.get(jax.default_backend())
    most = -(-len(trials) // (parts * devices))
    layout = layout_of(needs, len(trials), budget, devices, cached, most)
    if earlier is not None:
        size, at_once = earlier[0], earlier[1] or max(earlier[0] // devices, 1)
        before = Layout(size, at_once, devices)
        layout = before if not size % before.width and needs.of(before) <= budget else layout
    estimated = needs.of(layout)
    return [
        Group(list(trials[i : i + layout.size]), layout, plan, form, estimated)
        for i in range(0, len(trials), layout.size)
    ]


def check_step(study: Study, problem: Problem, stack: Stack, params: Params, batch: Any) -> None:
    """Trace a whole training step of one trial: what it cannot do is to be known before anything is written.

    Raises:
      StudyError: what the optimiser, the loss or accumulation raises.
    """
    made = programs(study, problem, stack.plan, 1, form=stack.form)
    own = study.stream == "seed"

    def step(batch: Any) -> Any:
        packed = pack(study, problem, stack.trials[:1], stack.plan, params, stack.form)
        running = made.init(packed.factors, packed.scalars)
        many = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(study.streams), *jnp.shape(x))), batch) if own else batch
        running, _ = made.step(running, packed.scalars, params, many)
        return made.finish(running)

    with told_in_words(f"a training step of {stack.trials[0].name!r} fails"):
        jax.eval_shape(step, batch)


def pack_bytes(study: Study, problem: Problem, stack: Stack, params: Params, batch: Any, count: int) -> int:
    """Estimated peak bytes beyond the base of one training step of `count` trials like the first of a stack."""
    (trial, *_), plan, form = stack
    training = training_loss(problem, plan, trials=count)
    shapes = jax.eval_shape(lambda: pack(study, problem, [trial], plan, params, form).factors)
    factors = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), shapes)
    own = study.stream == "seed"

    def one(factors: Any, batch: Any) -> Any:
        loss, _ = training(params, factors, batch, jax.random.key(0), scale=jnp.float32(1))
        return loss.total / loss.weight if isinstance(loss, Weighted) else loss

    def losses(factors: Any) -> Any:
        batches = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), batch) if own else batch
        return jax.vmap(one, (0, 0 if own else None))(factors, batches)

    return step_bytes(losses, factors)


def step_bytes(losses: Callable[[Any], Any], factors: Any) -> int:
    """Estimated peak bytes beyond the base of one training step.

    What the backward pass keeps is exactly what `jax.vjp` closes over, read here from shapes alone. To it come the
    factors, their gradients and two moments, and twice the largest operation as workspace. For the demo's 18 trials
    this gives 1.25 GB, where XLA on CPU allocates 1.51 GB: the budget of `available_bytes` leaves room for that.

    Args:
      losses: factors of the pack -> any array.
      factors: stacked factors, or shapes standing for them.
    """
    forward = jax.make_jaxpr(lambda f: jax.tree.leaves(jax.vjp(losses, f)[1]))(factors).jaxpr
    kept = {v for v in forward.outvars if not isinstance(v, jex.Literal)} - set(forward.constvars)  # not the base
    step = jax.make_jaxpr(jax.grad(lambda f: jnp.sum(losses(f))))(factors)
    return (
        sum(nbytes(v.aval.shape, v.aval.dtype) for v in kept)
        + 4 * _tree_bytes(factors)
        + 2 * _largest_operation(step.jaxpr)
    )


def _largest_operation(jaxpr: Any) -> int:
    """Most bytes that any one equation makes."""
    most = 0
    for eqn in jaxpr.eqns:
        inner = [_largest_operation(j) for j in jex.jaxprs_in_params(eqn.params)]
        most = max(most, *inner, sum(nbytes(v.aval.shape, v.aval.dtype) for v in eqn.outvars))
    return most


def _tree_bytes(tree: Any) -> int:
    return sum(nbytes(x.shape, x.dtype) for x in jax.tree_util.tree_leaves(tree) if hasattr(x, "dtype"))


def available_bytes(device: jax.Device) -> int:
    """Memory that a study may plan with: 75 % of what the device reports free, or 60 % of the host's available."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(0.75 * (int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))))
    return int(0.6 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def held_bytes(study: Study, problem: Problem, stack: Stack, params: Params) -> int:
    """Bytes of a trial that waits for its turn: its factors, and what the optimiser keeps of them."""
    made = programs(study, problem, stack.plan, 1, form=stack.form)

    def begin() -> Any:
        packed = pack(study, problem, stack.trials[:1], stack.plan, params, stack.form)
        return made.init(packed.factors, packed.scalars)

    return _tree_bytes(jax.eval_shape(begin))


class Needs(NamedTuple):
    """Bytes beyond the base that a step needs, per device.

    Attributes:
      one: of one trial alone.
      more: for each that is computed beside it.
      held: for each that waits for its turn.
    """

    one: int
    more: int
    held: int

    def of(self, layout: Layout) -> int:
        """Of a pack."""
        each = layout.size // layout.devices
        return self.one + (layout.at_once - 1) * self.more + (each - layout.at_once) * self.held


def layout_of(
    needs: Needs, trials: int, budget: int, devices: int = 1, cached: int | None = None, most: int | None = None
) -> Layout:
    """The layout of equal packs of `trials` that fit `budget` bytes per device: 15 that fit by 8 run as 8 and 7.

    Args:
      cached: what trials side by side are to need at most, though two may always be; None: as much as the budget.
      most: trials of a pack, per device; None: what fits.

    Raises:
      StudyError: not even one trial fits.
    """
    if needs.one > budget:
        raise StudyError(
            f"one trial needs about {needs.one / 2**20:.0f} MiB, the budget is {budget / 2**20:.0f} MiB.\n"
            "  use a smaller batch, shorter inputs or lower ranks, or raise the budget: memory_bytes=, --memory-mib"
        )
    at_once = fitting = 1 + (budget - needs.one) // needs.more
    if cached is not None:
        at_once = min(fitting, max(2, 1 + (cached - needs.one) // needs.more))
        fitting = at_once + (budget - needs.one - (at_once - 1) * needs.more) // max(needs.held, 1)
    return laid_out(trials, min(fitting, most or fitting), at_once, devices)
