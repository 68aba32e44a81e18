"""Compiles the programs of packs of one shape, and trains any number of them, from the start or from a save."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorax_kit.arrays.placement import DATA, FSDP, TRIAL
from lorax_kit.checkpoint.agreed import is_due
from lorax_kit.core.paths import Params, arrays_only
from lorax_kit.core.plan import Plan
from lorax_kit.errors import StudyError
from lorax_kit.measure import collective_bytes
from lorax_kit.parallel.layout import layout as base_layout
from lorax_kit.parallel.layout import place
from lorax_kit.parallel.sharded import gathered_anew, gathered_base, on_mesh, used_at
from lorax_kit.problem import Problem
from lorax_kit.problem.check import told_in_words
from lorax_kit.problem.evaluate import form_of_batch, summarised
from lorax_kit.processes import gathered, several, spread
from lorax_kit.study.design.study import Study
from lorax_kit.study.programs.forms import DEFAULT, Form
from lorax_kit.study.programs.packing import Pack, Scalars
from lorax_kit.study.programs.progress import Course, Progress, Trained
from lorax_kit.study.programs.slices import Layout, in_slices
from lorax_kit.study.programs.steps import Running, programs
from lorax_kit.training.objective import is_key
from lorax_kit.training.step import Info

SAVE_SECONDS = 30.0


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


def _is_at(running: Running, step: int) -> bool:
    """Whether a state is whole and of this step: interrupted inside a step it is gone, or ahead of the losses."""
    return not any(x.is_deleted() for x in jax.tree.leaves(running)) and int(running.state.step.max()) == step


class Engine:
    """Compiles the step of packs of one shape once (for each shape of batch), and runs any number of them.

    Args:
      study, problem, plan: what to train.
      base: the frozen params, shared by all trials.
      layout: of every pack.
      mesh: with an axis "trial", over which packs are spread, and perhaps "data" and "fsdp", over which each batch is,
        and over "fsdp" the base, too; None for one device.
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
        stacked = whole = None
        if mesh is not None:
            stacked, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(None, TRIAL), PartitionSpec()))
        self._mesh, self._stacked, self._whole = mesh, stacked, whole
        self.base, used = self._shared(arrays), list[NamedSharding | None]()
        if mesh is not None and mesh.shape.get(FSDP, 1) > 1:
            self.base = place(arrays, base_layout(arrays, mesh, {}))
            used = [used_at(x, (FSDP,)) for x in jax.tree.leaves(self.base)]
        parted = any(used)

        def whole_base(arrays: Any) -> Params:
            return put_back(gathered_base(arrays, used))

        made = programs(
            study, problem, plan, layout.size, whole_base if parted else put_back, form,
            anew=gathered_anew if parted else lambda loss: loss,
        )  # fmt: skip

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
        step = step if mesh is None else on_mesh(step, mesh)
        self.step = jax.jit(step, donate_argnums=(0,), **placed(stacked, whole))
        self._score = jax.jit(score, **placed(whole))
        self._finish = jax.jit(jax.vmap(made.finish), **placed(stacked))
        self._compiled: dict[Any, Any] = {}
        self.compile_seconds = 0.0
        self.temp_bytes = self.collective_bytes = 0

    def _placed(self, batch: Any) -> Any:
        """A batch on the mesh: its examples split over the axes "data" and "fsdp" where there are such.

        Raises:
          StudyError: examples that the devices do not divide.
        """
        if self._mesh is None:
            return batch
        mesh, at = self._mesh, 1 if self.study.stream == "seed" else 0
        axes = tuple(axis for axis in (DATA, FSDP) if axis in mesh.shape)
        parts = prod(mesh.shape[axis] for axis in axes)

        def sharding(x: Any) -> NamedSharding:
            if parts == 1 or np.ndim(x) <= at:
                return NamedSharding(mesh, PartitionSpec())
            if x.shape[at] % parts:
                raise StudyError(
                    f"a batch of {x.shape[at]} examples of problem {self.problem.name!r} does not split over {parts} "
                    f"devices.\n  choose a batch size that they divide, or fewer along {' and '.join(map(repr, axes))}"
                )
            return NamedSharding(mesh, PartitionSpec(*(None,) * at, axes))

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
        course = Course(layout.size, progress)
        last = self.study.steps if until is None else until

        def snapshot() -> Progress:
            return course.progress(layout.unfold(gathered([_words(x) for x in jax.tree.leaves(_without_key(running))])))

        def validate() -> None:
            number, every = course.steps, self.study.eval_every
            due = every and number and (number % every == 0 or number == self.study.steps)
            if val and (due or number == until) and not course.validated(number):
                metrics = self._evaluate((self._finish(running), scalars), count, own, val)
                course.evaluations.append((number, metrics))
                on_eval(number, metrics)

        with course.paused():
            validate()
        stream = batches(course.steps) if course.steps < last else iter(())
        saved = perf_counter()
        try:
            while course.steps < last:
                batch = self._next(stream, course.steps + 1)
                with course.paused():
                    step = self._step_for(running, scalars, count, batch)
                running, info = step(running, scalars, count, self.base, batch)
                course.note(*(layout.unfold(np.asarray(x)) for x in (info.loss, info.finite)))
                on_step(course.steps, course.losses[-1], course.failed)
                with course.paused():
                    validate()
                if is_due(perf_counter() - saved, SAVE_SECONDS, course.steps, several()):
                    on_save(snapshot())
                    saved = perf_counter()
        except BaseException:
            if course.steps and not several() and _is_at(running, course.steps):
                on_save(snapshot())
            raise
        done = snapshot()
        on_save(done)
        factors = layout.unfold(gathered(self._finish(running)))
        costs = (self.compile_seconds, self.temp_bytes, self.collective_bytes)
        return Trained(factors, done.losses, done.failed, done.evaluations, done.seconds, *costs), done

    def _next(self, stream: Iterator[Any], number: int) -> Any:
        """The batch of a step, on the mesh.

        Raises:
          StudyError: there is none, or the devices do not divide it.
        """
        batch = next(stream, None)
        if batch is None:
            raise StudyError(
                f"the training batches of problem {self.problem.name!r} end before step {number} of "
                f"{self.study.steps}.\n  its train(seed, start) must be endless: begin the data anew"
            )
        return self._placed(batch)

    def _step_for(self, running: Running, scalars: Scalars, count: Any, batch: Any) -> Any:
        """The compiled step for batches of this shape."""
        form = form_of_batch(batch)
        if form not in self._compiled:
            self._compiled[form] = self.compile(running, scalars, count, batch)
        return self._compiled[form]

    def finished(self, pack: Pack, progress: Progress) -> Trained:
        """What a pack came to that was trained before."""
        return self.train(pack, lambda _: iter(()), progress=progress, until=len(progress.losses))[0]

    def compile(self, running: Running, scalars: Scalars, count: Any, batch: Any) -> Any:
        """Compile ahead of time: the executable cannot be compiled again behind our back, only replaced here."""
        began = perf_counter()
        with told_in_words(f"the training step of problem {self.problem.name!r} does not compile"):
            compiled = self.step.lower(running, scalars, count, self.base, batch).compile()
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
