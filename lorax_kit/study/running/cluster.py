"""Trains groups of trials on the workers of a Ray cluster; a worker that is lost costs the group it had.

This is the one file that imports Ray, the `cluster` extra.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import sys
import tempfile
import uuid
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from tqdm import tqdm

from lorax_kit.core.specs.setting import is_int, shown
from lorax_kit.errors import StudyError
from lorax_kit.extras import need
from lorax_kit.problem import Problem
from lorax_kit.study.design.study import Study
from lorax_kit.study.folder.parcel import Parcel, packed
from lorax_kit.study.folder.store import RunStore
from lorax_kit.study.programs.progress import Progress

if TYPE_CHECKING:
    from lorax_kit.study.running.session import Job, Session

LOSSES = 3
"""How often one group may lose its worker before the study ends: what kills three is not chance."""
SETTINGS = (
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)


@dataclass(frozen=True)
class Workers:
    """Workers of a Ray cluster: the one at the address `RAY_ADDRESS`, or this machine.

    Each trains one group of trials at a time on devices of its own, and gives rows, curves and adapters to the process
    that called `lk.run`: the run folder needs no shared file system. Groups are planned for devices like those of that
    process; where the workers' have another memory, say so by `memory_bytes`.

    Attributes:
      count: how many.
      cpus, gpus: of each, as Ray counts them.

    Raises:
      StudyError: numbers out of range.
    """

    count: int
    cpus: float = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        if not is_int(self.count) or self.count < 1:
            raise StudyError(f"workers: {shown(self.count)} of them; it must be an integer of at least 1.")
        for name in ("cpus", "gpus"):
            x = getattr(self, name)
            if isinstance(x, bool) or not isinstance(x, int | float) or not 0 <= x < float("inf"):
                raise StudyError(f"workers: {name} is {shown(x)}; it must be a number of at least 0.")
            if x > 1 and x != int(x):
                raise StudyError(f"workers: {name} is {shown(x)}; above 1 it must be a whole number.")


class Assignment(NamedTuple):
    """What every worker of a study is given once.

    Attributes:
      study, problem: what to train.
      identity: of the run folder.
      config: JAX's settings that change numbers.
      scratch: for the folders of workers.
    """

    study: Study
    problem: Problem
    identity: Any
    config: dict[str, Any]
    scratch: Path


class Worker:
    """A session of its own over a temporary run folder; lives in a process of a worker."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._made: tuple[Session, RunStore] | None = None

    def _opened(self) -> tuple[Session, RunStore]:
        """Made at the first call: what a problem raises is then an error of that call."""
        if self._made is None:
            from lorax_kit.study.running.session import Session

            for name, value in self._assignment.config.items():
                jax.config.update(name, value)
            study, problem, identity, _, scratch = self._assignment
            scratch.mkdir(parents=True, exist_ok=True)
            store = RunStore(Path(tempfile.mkdtemp(dir=scratch)), identity)
            store.create()
            self._made = (Session(study, problem, problem.params(jax.random.key(0)), store, None, False), store)
        return self._made

    def run(self, job: Job) -> tuple[int, Parcel]:
        """Train a group to the end: (compilations of this worker so far, what its trials came to)."""
        session, store = self._opened()
        session.run([job])
        return session.compiles, packed(store, [trial.name for trial in job.group.trials])

    def finish(self, job: Job) -> tuple[int, Parcel]:
        """What trials came to that were trained to the end: as `run`."""
        session, store = self._opened()
        session.finish([job])
        return session.compiles, packed(store, [trial.name for trial in job.group.trials])

    def train(self, job: Job) -> tuple[int, Progress]:
        """Train a group to its step: (compilations of this worker so far, where its trials stand)."""
        session, store = self._opened()
        ((_, progress),) = session.train([job])
        store.drop_progress()
        return session.compiles, progress


class Cluster:
    """Trains groups as `Session` does, on workers.

    Args:
      session: whose store takes what they come to.
      workers: how many, and of what size.

    Raises:
      StudyError: Ray is not installed, the cluster has not the resources.
    """

    def __init__(self, session: Session, workers: Workers) -> None:
        self.session, self.workers = session, workers
        self._ray = library()
        self._begun = not self._ray.is_initialized()
        if self._begun:
            begin(self._ray, workers)
        self._scratch = Path(tempfile.gettempdir()) / f"lorax-kit-{uuid.uuid4().hex}"
        self._idle: list[Any] = []
        try:
            self._check()
            self._given = self._sent(session)
            self._actor = self._ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus, max_restarts=0)(Worker)
        except BaseException:
            self.close()
            raise

    def _sent(self, session: Session) -> Any:
        """What every worker is given, in Ray's store."""
        config = {name: getattr(jax.config, name) for name in SETTINGS if hasattr(jax.config, name)}
        store = session.store
        assert isinstance(store, RunStore), "several processes have no workers"
        given = Assignment(session.study, session.problem, store.identity, config, self._scratch)
        try:
            return self._ray.put(given)
        except Exception as e:
            raise StudyError(
                f"problem {session.problem.name!r} cannot be sent to workers: {e}\n"
                "  its functions must be picklable: no open files, locks or generators in them"
            ) from None

    def run(self, jobs: Sequence[Job]) -> None:
        """As `Session.run`; a group that was under way here goes on there."""
        jobs = [job._replace(before=self.session.under_way(job)) for job in jobs]
        self._keep(jobs, lambda worker, job: worker.run.remote(job))
        self.session.store.drop_progress()

    def finish(self, jobs: Sequence[Job]) -> None:
        """As `Session.finish`."""
        self._keep(jobs, lambda worker, job: worker.finish.remote(job))

    def train(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Progress]]:
        """As `Session.train`; the first that is done comes first."""
        yield from self._results(jobs, lambda worker, job: worker.train.remote(job))

    def close(self) -> None:
        """End the workers, and the cluster if it was begun here."""
        for worker in self._idle:
            self._ray.kill(worker)
        self._idle = []
        if self._begun:
            self._ray.shutdown()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _check(self) -> None:
        """A cluster that is too small would wait forever."""
        have, each = self._ray.cluster_resources(), self.workers
        for name, key, wanted in (("CPUs", "CPU", each.cpus), ("GPUs", "GPU", each.gpus)):
            if wanted * each.count > have.get(key, 0):
                raise StudyError(
                    f"{each.count} workers need {wanted * each.count:g} {name}; the cluster has {have.get(key, 0):g}.\n"
                    f"  fewer workers, or fewer {name} for each"
                )

    def _keep(self, jobs: Sequence[Job], call: Callable[[Any, Job], Any]) -> None:
        for _, parcel in self._results(jobs, call):
            self.session.outcomes.take(parcel)

    def _results(self, jobs: Sequence[Job], call: Callable[[Any, Job], Any]) -> Iterator[tuple[int, Any]]:
        """What the calls return, as they return; a call whose worker is lost is made again, to another."""
        ray, waiting, lost = self._ray, deque(range(len(jobs))), Counter[int]()
        under_way: dict[Any, tuple[int, Any]] = {}
        count = min(self.workers.count, len(jobs))
        bar = tqdm(
            total=len(jobs), desc=f"{count} workers", unit="group", disable=None if self.session.progress else True
        )
        try:
            with bar:
                while waiting or under_way:
                    while waiting and len(under_way) < self.workers.count:
                        worker = self._idle.pop() if self._idle else self._actor.remote(self._given)
                        i = waiting.popleft()
                        under_way[call(worker, jobs[i])] = (i, worker)
                    (done,), _ = ray.wait(list(under_way), num_returns=1)
                    i, worker = under_way.pop(done)
                    try:
                        compiles, result = ray.get(done)
                    except ray.exceptions.RayTaskError as e:
                        raise getattr(e, "cause", None) or e from None
                    except ray.exceptions.RayError as e:
                        lost[i] += 1
                        names = ", ".join(trial.name for trial in jobs[i].group.trials[:3])
                        if lost[i] > LOSSES:
                            raise StudyError(
                                f"the workers of the group of {names} were lost {lost[i]} times: {e}\n"
                                "  they may need more memory: fewer workers, or a smaller memory_bytes"
                            ) from None
                        tqdm.write(f"the worker of the group of {names} was lost; it begins anew", file=sys.stderr)
                        waiting.appendleft(i)
                        continue
                    self._idle.append(worker)
                    self.session.compiled_elsewhere[worker._actor_id.hex()] = compiles
                    bar.update()
                    yield i, result
        finally:
            for _, worker in under_way.values():
                ray.kill(worker)


def library() -> Any:
    """Ray.

    Raises:
      StudyError: it is not installed.
    """
    need("cluster", "ray", raises=StudyError)
    import ray

    return ray


def begin(ray: Any, workers: Workers) -> None:
    """Connect to the cluster at `RAY_ADDRESS`, or begin one on this machine, which Ray guards by a token.

    Raises:
      StudyError: there is none.
    """
    options: dict[str, Any] = {}
    where = os.environ.get("RAY_ADDRESS")
    if not where:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when a cluster begins: it would report its use
        cpus = max(math.ceil(workers.cpus * workers.count), 1)
        options = {"num_cpus": cpus, "include_dashboard": False}
    with warnings.catch_warnings():
        # Ray starts its processes by exec after fork, which JAX's threads do not mind.
        warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
        try:
            host, _, port = (where or "").rpartition(":")
            if port.isdecimal() and "/" not in host:  # Ray would ask an address where nothing is for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(logging_level="warning", **options)
        except Exception as e:  # of many kinds: a port, a socket's path, an address where nothing is
            what = f"the Ray cluster at RAY_ADDRESS={where!r} cannot be reached" if where else "Ray cannot begin here"
            raise StudyError(f"{what}: {type(e).__name__}: {e}") from None
