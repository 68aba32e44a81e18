"""Trains groups of trials in this process, one after the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from lorax_kit.core.paths import Params
from lorax_kit.problem import LOSS, Problem
from lorax_kit.problem.check import told_in_words
from lorax_kit.study.design.study import Study
from lorax_kit.study.folder.shared import SharedStore
from lorax_kit.study.folder.store import RunStore
from lorax_kit.study.programs.engine import Engine
from lorax_kit.study.programs.forms import Form, stream_of
from lorax_kit.study.programs.groups import Group
from lorax_kit.study.programs.packing import Pack, pack
from lorax_kit.study.programs.progress import Progress, Trained
from lorax_kit.study.running.outcomes import Bases, Outcomes
from lorax_kit.study.trackers import Tracker
from lorax_kit.training.objective import is_key


class Job(NamedTuple):
    """A group to train.

    Attributes:
      group, label: what, and its name on the bar.
      until: the step to train to.
      before: where its trials stand; None: at their start.
    """

    group: Group
    label: str
    until: int
    before: Progress | None = None


def _together(*x: Any) -> Any:
    """The leaves of several batches on one axis."""
    return jnp.stack(x) if is_key(x[0]) else np.stack(x)


class Session:
    """What the groups of one run share: engines by shape, so that equal groups share a compiled program.

    Args:
      study, problem, params, store: what to train, and where results go.
      mesh: as for `lk.run`.
      progress: draw bars.
      trackers: told of what happens.
    """

    def __init__(
        self,
        study: Study,
        problem: Problem,
        params: Params,
        store: RunStore | SharedStore,
        mesh: Mesh | None,
        progress: bool,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.study, self.problem, self.store = study, problem, store
        self.mesh, self.progress, self.began, self.trackers = mesh, progress, perf_counter(), trackers
        self.earlier_compiles = int(store.info.get("compiles") or 0)
        self.earlier_seconds = float(store.info.get("seconds") or 0.0)
        self.engines: dict[Any, Engine] = {}
        self.compiled_elsewhere: dict[str, int] = {}
        self.packed: tuple[Any, tuple[Engine, Pack]] | None = None
        self.bases = Bases(params)
        self.outcomes = Outcomes(
            study, problem, self.bases, store, lambda: (self.compiles, self.seconds), self.tell, progress
        )

    @property
    def compiles(self) -> int:
        """Compilations of the train step, over all sessions of this run folder."""
        here = sum(engine.compiles for engine in self.engines.values())
        return self.earlier_compiles + here + sum(self.compiled_elsewhere.values())

    @property
    def seconds(self) -> float:
        """Wall time, over all sessions of this run folder."""
        return self.earlier_seconds + perf_counter() - self.began

    def run(self, jobs: Sequence[Job]) -> None:
        """Train groups to their end, or go on with them, and write what their trials came to."""
        for job in jobs:
            saved = self.under_way(job)
            earlier = job.before if saved is None else saved
            trained, _ = self._train(job, earlier)
            self.outcomes.keep(job.group, trained, new=earlier is None or len(earlier.losses) < job.until)
            self.store.drop_progress()

    def train(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Progress]]:
        """Train groups to their step: yields the number of each job that is done, and where its trials stand."""
        for i, job in enumerate(jobs):
            saved = self.under_way(job)
            yield i, self._train(job, job.before if saved is None else saved)[1]

    def finish(self, jobs: Sequence[Job]) -> None:
        """Write what groups came to whose trials were trained to the end `before`, in other groups perhaps."""
        for job in jobs:
            assert job.before is not None
            engine, stacked = self._engine(job.group)
            self.outcomes.keep(job.group, engine.finished(stacked, job.before), new=True)

    def close(self) -> None:
        """Nothing: what trains elsewhere has workers to end."""

    def under_way(self, job: Job) -> Progress | None:
        """Where an interruption left a group, if that is the one it met."""
        return self.store.load_progress([trial.name for trial in job.group.trials], job.group.size)

    def _engine(self, group: Group) -> tuple[Engine, Pack]:
        """The compiled program of a group, and where its trials start."""
        names = [trial.name for trial in group.trials]
        if self.packed is not None and self.packed[0] == (names, group.layout):
            return self.packed[1]
        base = self.bases(group.form, group.plan)
        stacked = pack(self.study, self.problem, group.trials, group.plan, base, group.form, group.size)
        key = (group.plan, group.layout, group.form)
        if key not in self.engines:
            self.engines[key] = Engine(
                self.study, self.problem, group.plan, base, group.layout, self.mesh, form=group.form
            )
        self.packed = ((names, group.layout), (self.engines[key], stacked))
        return self.packed[1]

    def _batches(self, form: Form, start: int) -> Iterator[Any]:
        streams = [stream_of(self.study, self.problem, form, seed, start) for seed in self.study.streams]
        if self.study.stream == "shared":
            return streams[0]
        return (jax.tree.map(_together, *together) for together in zip(*streams, strict=False))

    def _train(self, job: Job, earlier: Progress | None) -> tuple[Trained, Progress]:
        (group, label, until, _), (engine, stacked) = job, self._engine(job.group)
        done, count = 0 if earlier is None else len(earlier.losses), len(group.trials)
        bar = tqdm(total=until, initial=done, desc=label, unit="step", disable=None if self.progress else True)
        shown: dict[str, str] = {}
        names = [trial.name for trial in group.trials]

        def on_step(number: int, losses: np.ndarray, failed: np.ndarray) -> None:
            own = losses[:count][failed[:count] == 0]
            shown["loss"] = f"{own.mean():.4f}" if len(own) else "nan"
            for i in np.flatnonzero(failed[:count] == number):
                name = stacked.trials[i].name
                tqdm.write(
                    f"{name}: loss is not finite at step {number}; this trial stops, the others go on", file=sys.stderr
                )
            bar.update()
            bar.set_postfix(shown)
            if self.trackers:
                alive = [i for i in range(count) if failed[i] in (0, number)]
                self.tell("step", step=number, losses={names[i]: float(losses[i]) for i in alive})

        def on_eval(number: int, metrics: list[dict[str, float]]) -> None:
            for metric in {"loss": LOSS, self.problem.metric: self.problem.chief}.values():
                mean = np.mean([m[metric.name] for m in metrics[:count]])
                shown[f"val_{metric.name}"] = format(mean, metric.format)
            bar.set_postfix(shown)
            self.tell("validation", step=number, metrics=dict(zip(names, metrics[:count], strict=True)))

        def on_save(progress: Progress) -> None:
            self.store.save_progress(names, progress)
            self.store.write_info(compiles=self.compiles, seconds=self.seconds)

        with bar:
            if engine.compiles == 0 and done < until:
                bar.set_postfix_str("compiling the step")
            return engine.train(
                stacked,
                partial(self._batches, group.form),
                self.problem.val,
                progress=earlier,
                until=until if until < self.study.steps else None,
                on_step=on_step,
                on_eval=on_eval,
                on_save=on_save,
            )

    def tell(self, event: str, **facts: Any) -> None:
        """Tell the trackers.

        Raises:
          StudyError: what one of them raises; the training is kept, and goes on without it.
        """
        for tracker in self.trackers:
            with told_in_words(f"tracker {getattr(tracker, '__name__', tracker)!r} fails at a {event!r} event"):
                tracker({"event": event, **facts})
