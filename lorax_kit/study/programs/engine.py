"""One compiled program that trains a pack of trials: `make_step`, mapped over the trial axis of the factors.

Base and (with a shared stream) batch are not mapped, so XLA computes what precedes the first adapted site once.
A trial's arithmetic is that of `lk.make_step` with its own rank, scale and rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorax_kit.core.leaves import keep_rows
from lorax_kit.core.paths import Params, arrays_only
from lorax_kit.core.plan import Plan
from lorax_kit.errors import StudyError
from lorax_kit.measure import collective_bytes
from lorax_kit.parallel.mesh import DATA, TRIAL
from lorax_kit.problem import Problem
from lorax_kit.problem.check import told_in_words
from lorax_kit.problem.evaluate import form_of_batch, scored, summarised
from lorax_kit.problem.objective import draws, training_loss, with_state
from lorax_kit.study.design.study import Study
from lorax_kit.study.programs.forms import DEFAULT, Form
from lorax_kit.study.programs.optimiser import evaluated, transformation
from lorax_kit.study.programs.packing import Pack, Scalars
from lorax_kit.study.programs.processes import gathered, several, spread, told
from lorax_kit.study.programs.progress import Progress, Trained
from lorax_kit.study.programs.slices import Layout, in_slices
from lorax_kit.training.objective import is_key
from lorax_kit.training.step import Info, State, make_step
from lorax_kit.transform.adapt import adapt

SAVE_SECONDS = 30.0


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
) -> Programs:
    """The programs of a pack. With a stream per seed, `batch` holds one batch per stream.

    Args:
      trials: of the pack, side by side or slice after slice; more than one share the base's products.
      whole: makes the base of what the programs are given as `base`: its arrays, where it holds other leaves, too.
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
        loss = partial(training, scale=scalars.scale, dropout=dropout, scalars=own)
        tx = optimizer(study, plan, scalars.lr, form, scalars.more)
        _, step = make_step(loss, tx, accumulate=form.accumulate, jit=False)
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


def _words(x: Array) -> Array:
    """A random key of an optimiser's state as its words; anything else as it is."""
    return jax.random.key_data(x) if is_key(x) else x


def _like(x: np.ndarray, fresh: Array) -> Array:
    """The inverse of `_words`, for a leaf that was `fresh` at the start."""
    return (
        jax.random.wrap_key_data(jnp.asarray(x), impl=jax.random.key_impl(fresh)) if is_key(fresh) else jnp.asarray(x)
    )


def _without_key(running: Running) -> Running:
    return running._replace(state=running.state._replace(key=None))


class Engine:
    """Compiles the step of packs of one shape once (for each shape of batch), and runs any number of them.

    Args:
      study, problem, plan: what to train.
      base: the frozen params, shared by all trials.
      layout: of every pack.
      mesh: with an axis "trial", over which packs are spread, and perhaps "data", over which each batch is; None for
        one device.
      form: what the step is compiled for.
    """

    def __init__(
        self,
        study: Study,
        problem: Problem,
        plan: Plan,
        base: Params,
        layout: Layout,
        mesh: Mesh | None = None,
        form: Form = DEFAULT,
    ) -> None:
        self.study, self.problem, self.plan, self.layout, self.compiles = study, problem, plan, layout, 0
        arrays, put_back = arrays_only(base)
        made = programs(study, problem, plan, layout.size, put_back, form)
        stacked = whole = None
        if mesh is not None:
            stacked, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(None, TRIAL), PartitionSpec()))
        self._mesh, self._stacked, self._whole = mesh, stacked, whole
        self.base = self._shared(arrays)

        def score(read: tuple[Any, Scalars], count: Array, base: Params, batch: Any) -> Any:
            def one(_: Any, read: tuple[Any, Scalars], *shared: Any) -> tuple[Any, Any]:
                return (), made.score(*read, *shared)

            return in_slices(one, layout)((), read, (base, batch), count)[1]

        def step(running: Running, scalars: Scalars, count: Array, base: Params, batch: Any) -> tuple[Running, Info]:
            out: tuple[Running, Info] = in_slices(made.step, layout)(running, scalars, (base, batch), count)
            return out

        def placed(*where: Any) -> dict[str, Any]:
            return {} if mesh is None else {"out_shardings": where if len(where) > 1 else where[0]}

        self._init = jax.jit(lambda factors, scalars: layout.fold(made.init(factors, scalars)))
        self._step = jax.jit(step, donate_argnums=(0,), **placed(stacked, whole))
        self._score = jax.jit(score, **placed(whole))
        self._finish = jax.jit(jax.vmap(made.finish), **placed(stacked))
        self._compiled: dict[Any, Any] = {}
        self.compile_seconds = 0.0
        self.temp_bytes = self.collective_bytes = 0

    def _placed(self, batch: Any) -> Any:
        """A batch on the mesh: its examples split over an axis "data" where there is one.

        Raises:
          StudyError: examples that the devices do not divide.
        """
        if self._mesh is None:
            return batch
        mesh, at = self._mesh, 1 if self.study.stream == "seed" else 0
        parts = mesh.shape.get(DATA, 1)

        def sharding(x: Any) -> NamedSharding:
            if parts == 1 or np.ndim(x) <= at:
                return NamedSharding(mesh, PartitionSpec())
            if x.shape[at] % parts:
                raise StudyError(
                    f"a batch of {x.shape[at]} examples of problem {self.problem.name!r} does not split over {parts} "
                    "devices.\n  choose a batch size that they divide, or fewer devices along 'data'"
                )
            return NamedSharding(mesh, PartitionSpec(*(None,) * at, DATA))

        return spread(batch, jax.tree.map(sharding, batch))

    def begin(self, pack: Pack, progress: Progress | None = None) -> tuple[Running, Scalars, Any]:
        """(running, scalars, slices to compute) at the start, or where a training stands: folded, and on the mesh."""
        running = self._init(pack.factors, pack.scalars)
        if progress is not None:
            key = running.state.key
            fresh, tree = jax.tree.flatten(_without_key(running))
            kept = [_like(x, like) for x, like in zip(progress.running, fresh, strict=True)]
            running = jax.tree.unflatten(tree, self.layout.fold(kept))
            running = running._replace(state=running.state._replace(key=key))
        count = self._shared(np.int32(self.layout.needed(len(pack.trials))))
        return self._spread(running), self._spread(self.layout.fold(pack.scalars)), count

    def _spread(self, tree: Any) -> Any:
        return tree if self._stacked is None else spread(tree, self._stacked)

    def _shared(self, tree: Any) -> Any:
        return tree if self._whole is None else spread(tree, self._whole)

    def train(
        self,
        pack: Pack,
        batches: Callable[[int], Iterator[Any]],
        val: Any = (),
        *,
        progress: Progress | None = None,
        until: int | None = None,
        on_step: Callable[[int, np.ndarray, np.ndarray], None] = lambda *_: None,
        on_eval: Callable[[int, list[dict[str, float]]], None] = lambda *_: None,
        on_save: Callable[[Progress], None] = lambda _: None,
    ) -> tuple[Trained, Progress]:
        """Train a pack to the end of the study's steps, or to an earlier one.

        Args:
          pack: the trials.
          batches: step -> the batches from there on.
          val: batches to validate on.
          progress: where an interrupted training goes on, to the same bits.
          until: the step to train to, which is validated, too; None: the study's last.
          on_step, on_eval: called after each step and validation.
          on_save: given the progress every half minute, at the end, and when an exception ends the training.
        """
        layout, own = self.layout, len(pack.trials)
        running, scalars, count = self.begin(pack, progress)
        losses: list[np.ndarray] = []
        evaluations: list[tuple[int, list[dict[str, float]]]] = []
        failed, earlier, paused = np.zeros(layout.size, int), 0.0, 0.0
        if progress is not None:
            losses, failed = list(progress.losses), progress.failed
            evaluations, earlier = list(progress.evaluations), progress.seconds
        began = saved = perf_counter()
        last = self.study.steps if until is None else until

        def snapshot() -> Progress:
            arrays = layout.unfold(gathered([_words(x) for x in jax.tree.leaves(_without_key(running))]))
            seconds = earlier + perf_counter() - began - paused
            return Progress(arrays, np.stack(losses), failed, evaluations, seconds)

        def validate(number: int) -> float:
            """Validate where it is due and was not done; seconds it took."""
            at, every = perf_counter(), self.study.eval_every
            due = val and every and number and (number % every == 0 or number == self.study.steps)
            due = due or (val and number == until)
            if due and number not in [n for n, _ in evaluations]:
                evaluations.append((number, self._evaluate((self._finish(running), scalars), count, own, val)))
                on_eval(*evaluations[-1])
            return perf_counter() - at

        paused += validate(len(losses))
        stream = batches(len(losses)) if len(losses) < last else iter(())
        try:
            for number in range(len(losses) + 1, last + 1):
                batch = next(stream, None)
                if batch is None:
                    raise StudyError(
                        f"the training batches of problem {self.problem.name!r} end before step {number} of "
                        f"{self.study.steps}.\n  its train(seed, start) must be endless: begin the data anew"
                    )
                batch = self._placed(batch)
                form = form_of_batch(batch)
                if form not in self._compiled:
                    began_compiling = perf_counter()
                    self._compiled[form] = self.compile(running, scalars, count, batch)
                    paused += perf_counter() - began_compiling
                running, info = self._compiled[form](running, scalars, count, self.base, batch)
                losses.append(layout.unfold(np.asarray(info.loss)))
                failed = np.where((failed == 0) & ~layout.unfold(np.asarray(info.finite)), number, failed)
                on_step(number, losses[-1], failed)
                paused += validate(number)
                if self._save_is_due(number, perf_counter() - saved):
                    on_save(snapshot())
                    saved = perf_counter()
        except BaseException:
            # Interrupted inside a step its state is gone or ahead of the losses: then the last save counts.
            leaves = jax.tree.leaves(running)
            if (
                losses
                and not several()
                and not any(x.is_deleted() for x in leaves)
                and int(running.state.step.max()) == len(losses)
            ):
                on_save(snapshot())
            raise
        done = snapshot()
        on_save(done)
        factors = layout.unfold(gathered(self._finish(running)))
        trained = Trained(
            factors,
            done.losses,
            failed,
            evaluations,
            done.seconds,
            self.compile_seconds,
            self.temp_bytes,
            self.collective_bytes,
        )
        return trained, done

    def finished(self, pack: Pack, progress: Progress) -> Trained:
        """What a pack came to that was trained before."""
        return self.train(pack, lambda _: iter(()), progress=progress, until=len(progress.losses))[0]

    def _save_is_due(self, number: int, seconds: float) -> bool:
        """Whether to keep the training now; several processes agree on it, every tenth step."""
        if not several():
            return seconds > SAVE_SECONDS
        return number % 10 == 0 and told(lambda: seconds > SAVE_SECONDS)

    def compile(self, running: Running, scalars: Scalars, count: Any, batch: Any) -> Any:
        """Compile ahead of time: the executable cannot be compiled again behind our back, only replaced here."""
        began = perf_counter()
        with told_in_words(f"the training step of problem {self.problem.name!r} does not compile"):
            compiled = self._step.lower(running, scalars, count, self.base, batch).compile()
        self.compiles += 1
        self.compile_seconds += perf_counter() - began
        self.collective_bytes = max(self.collective_bytes, self.layout.slices * collective_bytes(compiled))
        memory = compiled.memory_analysis()
        self.temp_bytes = max(self.temp_bytes, int(getattr(memory, "temp_size_in_bytes", 0)))
        return compiled

    def _evaluate(self, read: tuple[Any, Scalars], count: Any, own: int, batches: Any) -> list[dict[str, float]]:
        """The metrics of the first `own` trials of a pack, by name."""
        placed = [self._shared(batch) for batch in batches]
        parts = [self.layout.unfold(jax.device_get(self._score(read, count, self.base, batch))) for batch in placed]
        return [
            summarised(self.problem, jax.tree.map(lambda x: x[i], parts), batches)  # noqa: B023
            for i in range(own)
        ]
