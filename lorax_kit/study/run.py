"""`run`: a study from its design to its run folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from lorax_kit.analysis.spectra import delta_spectrum, effective_rank, rank_for_energy
from lorax_kit.checkpoint.adapter import adapter_bytes, save_adapter
from lorax_kit.core.errors import StudyError
from lorax_kit.core.factors import Factors
from lorax_kit.core.merge import merge
from lorax_kit.core.paths import Params, nbytes
from lorax_kit.core.plan import Plan
from lorax_kit.parallel.mesh import TRIAL
from lorax_kit.study import memory
from lorax_kit.study.design import Study, Trial
from lorax_kit.study.engine import Engine, Trained, with_scale
from lorax_kit.study.packing import Pack, Scalars, kinds, pack, trial_plan, union_plan, unpack
from lorax_kit.study.problem import Problem
from lorax_kit.study.store import RunStore, environment
from lorax_kit.training.evaluate import SharedPrefix
from lorax_kit.transform.adapt import adapt


class Results(NamedTuple):
    """What a study came to.

    Attributes:
      rows: one dict per trial, in the order of the design; the columns of `results.csv`.
      path: the run folder.
      compiles: how many times the train step was compiled.
    """

    rows: list[dict[str, Any]]
    path: Path
    compiles: int

    def best(self, metric: str = "val_accuracy") -> dict[str, Any]:
        """The finished trial with the highest `metric`."""
        done = [row for row in self.rows if row["status"] == "done" and row.get(metric) is not None]
        if not done:
            raise StudyError(f"no trial finished with a {metric}; see 'failed_step' in the rows.")
        return max(done, key=lambda row: row[metric])


def evaluator(problem: Problem, params: Params, plan: Plan, batches: Sequence[Any]) -> SharedPrefix:
    """Measures merged params of `plan`; a study and `lorax-kit evaluate` use this same program."""

    def score(params: Params, batch: Any) -> Any:
        return problem.score(problem.apply(params, batch), batch)

    return SharedPrefix(score, params, plan.trained, batches)


class _Group(NamedTuple):
    trials: list[Trial]
    size: int
    plan: Plan
    estimated_bytes: int


def run(
    study: Study,
    problem: Problem,
    *,
    out: str | Path,
    mesh: Mesh | None = None,
    memory_bytes: int | None = None,
    overwrite: bool = False,
    command: str = "",
    progress: bool = True,
) -> Results:
    """Run every trial of a study, or those its run folder lacks.

    Trials are stacked on one axis and trained by one compiled program, in equal groups that fit the memory; a group
    that is filled up repeats a trial whose copy is discarded, so that groups share the program. Each trained
    trial is then merged and tested alone, saved as an adapter, and its row written: an interruption loses only
    the group under way, and the same call goes on from there.

    Args:
      study, problem: what to train.
      out: the run folder.
      mesh: with an axis "trial", trials are spread over its devices (`lk.parallel.device_mesh("trial")`).
      memory_bytes: budget per device; None: what is free.
      overwrite: discard what the folder holds.
      command: the command line, for the report.
      progress: draw bars.

    Returns:
      `Results`.

    Raises:
      StudyError: a folder that holds something else, an empty data set, a trial that cannot fit the memory.
      PlanError: targets that do not fit the model, before anything is written.
    """
    began = perf_counter()
    if not problem.val or not problem.test:
        raise StudyError(f"problem {problem.name!r} has no validation or test examples.")
    trials = study.trials()
    params = problem.params(jax.random.key(0))
    batch = next(iter(problem.train(_stream_seeds(study)[0], 0)), None)
    if batch is None:
        raise StudyError(f"problem {problem.name!r} has no training batches: the data set is empty.")
    # Planned for the whole study first: a bad pattern or rank must not surface after an hour, nor leave a folder.
    budget = memory.available_bytes(jax.local_devices()[0]) if memory_bytes is None else memory_bytes
    devices = 1 if mesh is None else mesh.shape[TRIAL]
    planned = [(some, union_plan(study, problem, some, params, batch)) for some in kinds(study, trials)]
    store = RunStore(out, {"design": study.to_dict(), "problem": problem.name}, overwrite=overwrite)
    missing = [
        _grouped(
            study, problem, [t for t in some if t.name not in store.finished], plan, params, batch, budget, devices
        )
        for some, plan in planned
        if any(t.name not in store.finished for t in some)
    ]
    groups = [group for kind in missing for group in kind]
    head = problem.head
    if store.info.get("started") is None or groups:
        store.write_info(
            name=Path(out).name,
            command=command or store.info.get("command", ""),
            design=study.to_dict(),
            spec=study.spec(max(trials, key=lambda t: t.rank), head).to_dict(),
            environment=environment(),
            task=dict(problem.facts),
            started=store.info.get("started") or _now(),
            finished=store.info.get("finished") if not groups else None,
            seconds=store.info.get("seconds"),
            trials=[t.name for t in trials],
            compiles=store.info.get("compiles", 0),
            groups=store.info.get("groups", []),
        )
    session = _Session(study, problem, params, store, mesh, progress, len(trials), began)
    for group in groups:
        session.run_group(group)
    if groups:
        store.write_info(finished=_now())
    rows = [store.finished[t.name] for t in trials]
    return Results(rows, Path(out), int(store.info.get("compiles", 0)))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _stream_seeds(study: Study) -> list[int]:
    """Seeds of the data orders: one for all trials, or one per seed of the study."""
    return list(study.seed) if study.stream == "seed" else [0]  # type: ignore[arg-type]


def _grouped(
    study: Study,
    problem: Problem,
    trials: list[Trial],
    plan: Plan,
    params: Params,
    batch: Any,
    budget: int,
    devices: int,
) -> list[_Group]:
    """Equal groups of one kind of trials, from the memory that one and two stacked trials need."""

    def need(n: int) -> int:
        adapted = adapt(problem.apply, plan, trials=n)
        shapes = jax.eval_shape(lambda: pack(study, problem, trials[:1], plan, params).factors)
        factors = jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), shapes)
        own = study.stream == "seed"

        def loss(factors: Any) -> Any:
            batches = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), batch) if own else batch
            mapped = jax.vmap(
                lambda f, b: problem.loss(adapted(params, with_scale(f, jnp.float32(1)), b), b), (0, 0 if own else None)
            )
            return mapped(factors, batches)

        return memory.estimate(loss, factors)

    one, two = need(1), need(2)
    size = memory.group_size(one, two, len(trials), budget, devices)
    estimated = one + (size - 1) * max(two - one, 0)
    return [_Group(some, size, plan, estimated) for some in memory.balanced(trials, size)]


class _Session:
    """What the groups of one run share: engines by shape, so that equal groups share a compiled program."""

    def __init__(
        self,
        study: Study,
        problem: Problem,
        params: Params,
        store: RunStore,
        mesh: Mesh | None,
        progress: bool,
        total: int,
        began: float,
    ) -> None:
        self.study, self.problem, self.params, self.store = study, problem, params, store
        self.mesh, self.progress, self.total, self.began = mesh, progress, total, began
        self.engines: dict[Any, Engine] = {}
        self.before = int(store.info.get("compiles", 0))
        self.before_seconds = float(store.info.get("seconds") or 0.0)

        self.tests: dict[Any, tuple[SharedPrefix, SharedPrefix]] = {}

    @property
    def compiles(self) -> int:
        """Compilations of the train step, over all sessions of this run folder."""
        return self.before + sum(engine.compiles for engine in self.engines.values())

    def run_group(self, group: _Group) -> None:
        filled = [*group.trials, *[group.trials[-1]] * (group.size - len(group.trials))]
        stacked = pack(self.study, self.problem, filled, group.plan, self.params)
        seeds = None
        if self.study.stream == "seed":
            order = _stream_seeds(self.study)
            seeds = np.asarray([order.index(t.seed) for t in filled])
        key = (group.plan, group.size, None if seeds is None else tuple(seeds))
        if key not in self.engines:
            args = (self.study, self.problem, group.plan, self.params, group.size, self.mesh, seeds)
            self.engines[key] = Engine(*args)
        engine = self.engines[key]
        trained = self._train(engine, stacked, group)
        self._keep(group, stacked, trained)

    def _batches(self) -> Iterator[Any]:
        streams = [self.problem.train(seed, 0) for seed in _stream_seeds(self.study)]
        if self.study.stream == "shared":
            return streams[0]
        return (jax.tree.map(lambda *x: np.stack(x), *together) for together in zip(*streams, strict=True))

    def _train(self, engine: Engine, stacked: Pack, group: _Group) -> Trained:
        done = len(self.store.finished)
        label = f"trials {done + 1}-{done + len(group.trials)} of {self.total}"
        bar = tqdm(total=self.study.steps, desc=label, unit="step", disable=not self.progress)
        count = len(group.trials)
        shown: dict[str, str] = {}

        def on_step(number: int, losses: np.ndarray, failed: np.ndarray) -> None:
            own = losses[:count][failed[:count] == 0]
            shown["loss"] = f"{own.mean():.4f}" if len(own) else "nan"
            for i in np.flatnonzero(failed[:count] == number):
                name = stacked.trials[i].name
                tqdm.write(f"{name}: loss is not finite at step {number}; this trial stops, the others go on")
            bar.update()
            bar.set_postfix(shown)

        def on_eval(number: int, metrics: list[dict[str, float]]) -> None:
            shown["val_loss"] = f"{np.mean([m['loss'] for m in metrics[:count]]):.4f}"
            shown["val_accuracy"] = f"{np.mean([m['accuracy'] for m in metrics[:count]]):.4f}"
            bar.set_postfix(shown)

        with bar:
            if engine.compiles == 0:
                bar.set_postfix_str("compiling the step")
            return engine.train(stacked, self._batches(), self.problem.val, on_step, on_eval)

    def _keep(self, group: _Group, stacked: Pack, trained: Trained) -> None:
        """Curves, then each trial: merged and tested alone, saved, its row written."""
        count = len(group.trials)
        every = dict(trained.evaluations)
        for i, trial in enumerate(group.trials):
            rows = []
            for step, loss in enumerate(trained.losses[:, i], 1):
                row: dict[str, Any] = {"trial": trial.name, "step": step, "loss": float(loss)}
                if step in every:
                    row |= {"val_loss": every[step][i]["loss"], "val_accuracy": every[step][i]["accuracy"]}
                rows.append(row)
                if trained.failed[i] == step:
                    break
            self.store.append("curves.jsonl", rows)
        described = {
            "trials": count,
            "size": group.size,
            "estimated_bytes": group.estimated_bytes,
            "temp_bytes": trained.temp_bytes,
            "seconds": trained.seconds,
            "compile_seconds": trained.compile_seconds,
        }
        self.store.write_info(
            compiles=self.compiles,
            groups=[*self.store.info.get("groups", []), described],
            seconds=self.before_seconds + perf_counter() - self.began,
        )
        bar = tqdm(range(count), desc="testing, saving", unit="trial", disable=not self.progress)
        for i in bar:
            row = self._trial_row(group, stacked.scalars, trained, i)
            bar.set_postfix_str(f"{row['trial']}: test_accuracy {row['test_accuracy']}")
            self.store.finish_trial(row)
            self.store.write_info(seconds=self.before_seconds + perf_counter() - self.began)

    def _trial_row(self, group: _Group, scalars: Scalars, trained: Trained, i: int) -> dict[str, Any]:
        trial, study, problem = group.trials[i], self.study, self.problem
        plan = trial_plan(study, problem, group.plan, trial, self.params)
        factors = unpack(plan, trained.factors, i)
        leaves = jax.tree_util.tree_leaves(factors)
        failed = int(trained.failed[i]) or None
        row: dict[str, Any] = {
            "trial": trial.name,
            "rank": trial.rank,
            "alpha": trial.alpha,
            "lr": trial.lr,
            "seed": trial.seed,
            "targets": trial.targets,
            "variant": trial.variant,
            "params": sum(x.size for x in leaves),
            "factor_bytes": sum(nbytes(x.shape, x.dtype) for x in leaves),
            "adapter_bytes": None,
            "steps": failed or study.steps,
            "train_loss": None,
            "val_loss": None,
            "val_accuracy": None,
            "test_loss": None,
            "test_accuracy": None,
            "train_seconds": trained.seconds / len(group.trials),
            "compiles": self.compiles,
            "status": "diverged" if failed else "done",
            "failed_step": failed,
            "adapter": None,
        }
        if failed:
            return row
        spec = study.spec(trial, problem.head)
        merged = merge(self.params, factors, plan)
        val, test = (measure(merged) for measure in self._tests(plan))
        path = self.store.adapter_path(trial.name)
        save_adapter(
            path,
            spec,
            factors,
            base=self.params,
            plan=plan,
            meta={"problem": problem.name, "settings": problem.facts.get("settings"), "trial": trial.name},
            overwrite=True,
        )
        last = trained.losses[-max(study.steps // 10, 1) :, i]
        self._spectra(plan, factors, trial)
        return row | {
            "adapter_bytes": adapter_bytes(path),
            "train_loss": float(last.mean()),
            "val_loss": val["loss"],
            "val_accuracy": val["accuracy"],
            "test_loss": test["loss"],
            "test_accuracy": test["accuracy"],
            "adapter": f"adapters/{trial.name}",
        }

    def _tests(self, plan: Plan) -> tuple[SharedPrefix, SharedPrefix]:
        """Validation and test of merged params; trials of one target set share them."""
        if plan.trained not in self.tests:
            made = (evaluator(self.problem, self.params, plan, part) for part in (self.problem.val, self.problem.test))
            self.tests[plan.trained] = (next(made), next(made))
        return self.tests[plan.trained]

    def _spectra(self, plan: Plan, factors: Any, trial: Trial) -> None:
        rows = []
        for site in plan.sites:
            found = factors[site.path]
            assert isinstance(found, Factors)
            stack = len(site.axes.stack)
            s = np.asarray(delta_spectrum(found.a, found.b, site.scale, batch_axes=stack)).reshape(
                -1, site.setting.rank
            )
            mean = s.mean(axis=0)
            rows.append(
                {
                    "trial": trial.name,
                    "site": site.path,
                    "rank": trial.rank,
                    "singular_values": [float(x) for x in mean],
                    "effective_rank": float(effective_rank(mean)),
                    "rank90": int(rank_for_energy(mean, 0.9)),
                }
            )
        self.store.append("spectra.jsonl", rows)
