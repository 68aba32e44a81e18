"""`run`: a study from its design to its run folder."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax.sharding import Mesh

from lorax_kit.checkpoint.fingerprint import digests, fingerprint, whole_fingerprint
from lorax_kit.checkpoint.orbax_files import ready
from lorax_kit.core.paths import Params
from lorax_kit.core.specs.setting import is_number
from lorax_kit.errors import StudyError
from lorax_kit.problem import Problem
from lorax_kit.processes import lost_process_told, several
from lorax_kit.study.design.stopping import Stopping
from lorax_kit.study.design.study import Study
from lorax_kit.study.design.trial import Trial
from lorax_kit.study.folder.shared import SharedStore
from lorax_kit.study.folder.store import RunStore, environment
from lorax_kit.study.frame import frame
from lorax_kit.study.machines import machines_of, team_of
from lorax_kit.study.plan import check_race, check_rows, planned_groups, planned_stacks
from lorax_kit.study.programs.forms import DEFAULT, Examples
from lorax_kit.study.programs.groups import Group
from lorax_kit.study.running.cluster import Cluster, Workers
from lorax_kit.study.running.race import Race
from lorax_kit.study.running.session import Job, Session
from lorax_kit.study.trackers import Tracker
from lorax_kit.training.fit import direction

if TYPE_CHECKING:
    from lorax_kit.study.frame import DataFrame


class Results(NamedTuple):
    """What a study came to.

    Attributes:
      rows: one dict per trial, in the order of the design; the columns of `results.csv`.
      path: the run folder.
      compiles: how many times the train step was compiled.
      metric: the problem's, which chooses.
      directions: column -> "higher" or "lower", of the problem's metrics.
    """

    rows: list[dict[str, Any]]
    path: Path
    compiles: int
    metric: str = "loss"
    directions: Mapping[str, str] = MappingProxyType({"train_loss": "lower", "val_loss": "lower"})

    def best(self, metric: str | None = None, better: str | None = None) -> dict[str, Any]:
        """Find the finished trial with the best `metric`; of equal ones the smallest, then the lowest validation loss.

        Args:
          metric: a column of the rows; None: the problem's metric on the validation set.
          better: "lower" or "higher"; the columns of the problem's metrics and losses know, and need none.

        Raises:
          StudyError: no trial finished with a finite number there.
          LoraxError: another column without `better`.
        """
        metric = f"val_{self.metric}" if metric is None else metric
        sign = direction(metric, better, self.directions)
        done = [row for row in self.rows if row["status"] == "done" and is_number(row.get(metric))]
        if not done:
            raise StudyError(f"no trial finished with a {metric}; see 'failed_step' in the rows.")

        def loss(row: dict[str, Any]) -> float:
            return row["val_loss"] if is_number(row["val_loss"]) else float("inf")

        return max(done, key=lambda row: (sign * row[metric], -row["params"], -loss(row)))

    def table(self) -> DataFrame:
        """The rows as a pandas data frame, a line per trial: `results.table().groupby("rank")["test_accuracy"].mean()`.

        Raises:
          StudyError: pandas, the `table` extra, is not installed.
        """
        return frame(self.rows)


@lost_process_told()
def run(
    study: Study,
    problem: Problem,
    *,
    out: str | Path,
    mesh: Mesh | None = None,
    workers: int | Workers | None = None,
    memory_bytes: int | None = None,
    overwrite: bool = False,
    command: str = "",
    progress: bool = True,
    trackers: Sequence[Tracker] = (),
) -> Results:
    """Run every trial of a study, or those its run folder lacks: a folder grows by more seeds, ranks, rates or methods.

    Trials are stacked on one axis and trained by one compiled program, in equal groups that fit the memory; a group
    that is filled up repeats a trial whose copy is discarded, so that groups share the program. Each trained
    trial is then merged and tested alone, saved as an adapter, and its row written. The training under way is
    saved every half minute and at an interruption; the same call goes on from there, to the same bits.

    Args:
      study, problem: what to train.
      out: the run folder.
      mesh: with an axis "trial", trials are spread over its devices (`lk.device_mesh("trial")`); with an axis "data",
        too, so is each batch (`lk.study_mesh(trials=2, data=4)`).
      workers: processes of a Ray cluster that each train a group of trials at a time: a number, or `Workers`. A worker
        that is lost costs the group that it had, which another trains anew, to the same bits; an interruption of this
        process costs the groups that the workers have.
      memory_bytes: budget per device; None: what is free.
      overwrite: discard what the folder holds.
      command: the command line, for the report.
      progress: draw bars, where stderr is a terminal.
      trackers: functions that are told of steps, validations and rows while the study runs:
        `lorax_kit.study.trackers` has TensorBoard and Weights & Biases. Of workers they are told rows alone.

    Returns:
      `Results`.

    Raises:
      StudyError: a mesh without that axis, workers without Ray, a folder that holds something else, an empty data set,
        a problem that breaks its contract, a trial that cannot fit the memory.
      PlanError: targets that do not fit the model, before anything is written.
    """
    team = team_of(workers)
    machines = machines_of(mesh, team, memory_bytes)
    trials, params, examples = study.trials(), problem.params(jax.random.key(0)), Examples(study, problem)
    # Planned for the whole study first: a bad pattern or rank must not surface after an hour, nor leave a folder.
    planned = planned_stacks(study, problem, trials, params, examples)
    head = {leaf.path for stack in planned for leaf in stack.plan.full}
    leaves = digests(params, head)
    first = examples(DEFAULT) if study.streams[0] == 0 else next(iter(problem.train(0, 0)))
    about = identity(study, problem, params, first, head)

    def opened() -> RunStore:
        return RunStore(out, about, overwrite=overwrite, leaves=leaves)

    store: RunStore | SharedStore = SharedStore(opened) if several() else opened()
    targets = merged_targets(store.info.get("targets"), study.targets, str(out))
    check_rows(trials, store.finished)
    if study.stop is not None:
        check_race(trials, store.info, str(out))
    by_stack, records = planned_groups(study, problem, planned, store, params, examples, machines)
    groups = [group for found in by_stack for group in found]
    session = Session(study, problem, params, store, mesh, progress, trackers)
    baseline = store.info.get("baseline")
    if groups:
        plain_form = groups[0].form.dtype is None and groups[0].form.quantise is None
        measured = session.outcomes.check(groups[0])
        baseline = check_baseline(baseline, measured) if plain_form else baseline
    ready()
    # Before the folder: a cluster that is none leaves none.
    trainer = session if team is None or not groups else Cluster(session, team)
    try:
        store.create()
        if store.info.get("started") is None or groups:
            store.write_info(
                **_described(study, problem, trials, store.info, ended=not groups),
                name=Path(out).name,
                command=command or store.info.get("command", ""),
                targets=targets,
                stacks=records,
                baseline=baseline,
                leaves=leaves,
            )
        if isinstance(study.stop, Stopping) and groups:
            Race(session, trainer, study.stop, by_stack).run()
        else:
            trainer.run(jobs_of(groups, study.steps))
        store.drop_rungs()
        if groups:
            store.write_info(finished=_now())
    finally:
        trainer.close()
        store.close()
    rows = [store.finished[t.name] for t in trials]
    directions = {f"{part}_{m.name}": m.better for part in ("val", "test") for m in problem.all_metrics}
    return Results(
        rows, Path(out), int(store.info.get("compiles", 0)), problem.metric, {"train_loss": "lower", **directions}
    )


def jobs_of(groups: Sequence[Group], steps: int) -> list[Job]:
    """Groups to train to the end."""
    places = [f"group {i} of {len(groups)}, " if len(groups) > 1 else "" for i in range(1, len(groups) + 1)]
    return [
        Job(group, f"{place}{len(group.trials)} trials", steps) for place, group in zip(places, groups, strict=True)
    ]


def check_baseline(earlier: Any, ours: dict[str, float]) -> dict[str, float]:
    """The metrics of the untrained model, which a folder keeps.

    Raises:
      StudyError: it had others when the folder was made: `apply`, `score` or a metric is another one.
    """
    for name, value in ours.items():
        before = earlier.get(name) if isinstance(earlier, Mapping) else None
        if before is not None and is_number(value) and abs(value - before) > 1e-3 * max(abs(value), abs(before)):
            raise StudyError(
                f"the untrained model measures {name} {value:g} on the first batch, and {before:g} when the folder was "
                "made.\n  its apply, score or metrics are others: choose another folder"
            )
    return ours if not isinstance(earlier, Mapping) else dict(earlier)


def merged_targets(earlier: Any, ours: Mapping[str, Sequence[str]], folder: str) -> dict[str, list[str]]:
    """The target sets of a folder, by name.

    Raises:
      StudyError: a name that stands for other patterns there.
    """
    before = earlier if isinstance(earlier, Mapping) else {}
    for name, patterns in ours.items():
        if name in before and list(before[name]) != list(patterns):
            raise StudyError(
                f"targets {name!r} are {list(before[name])} in {folder!r}, and {list(patterns)} in this study.\n"
                "  trials go by the name: choose another for the new patterns"
            )
    return {**before, **{name: list(patterns) for name, patterns in ours.items()}}


def identity(study: Study, problem: Problem, params: Params, batch: Any, head: Collection[str]) -> dict[str, Any]:
    """What makes two runs the same study: a folder holds only one. Weights and data count by their digests.

    Args:
      batch: the first training batch.
      head: paths of the parameters that every trial draws anew.
    """
    design = {
        **study.common(),
        "problem": problem.name,
        "settings": problem.facts.get("settings"),
        "metrics": [problem.metric, *([m.name, m.better, m.format] for m in problem.all_metrics)],
        "base": fingerprint(params, head),
        "data": whole_fingerprint([batch, *problem.val, *problem.test]),
    }
    try:
        json.dumps([design, dict(problem.facts)])
    except (TypeError, ValueError) as e:
        raise StudyError(f"the facts of problem {problem.name!r} are not plain data: {e}.") from None
    return design


def _described(
    study: Study, problem: Problem, trials: Sequence[Trial], info: Mapping[str, Any], *, ended: bool
) -> dict[str, Any]:
    """What a run folder says of its study before anything is trained.

    Args:
      info: what it says already.
      ended: whether no trial is left to train.
    """
    largest = max(trials, key=lambda trial: trial.rank)
    return {
        "design": study.to_dict(),
        "spec": study.spec(largest, problem.whole_rules).to_dict(),
        "environment": environment(),
        "task": dict(problem.facts),
        "state": list(problem.state),
        "metric": problem.metric,
        "metrics": [metric.to_dict() for metric in problem.all_metrics],
        "started": info.get("started") or _now(),
        "finished": info.get("finished") if ended else None,
        "seconds": info.get("seconds"),
        "trials": list(dict.fromkeys([*(info.get("trials") or ()), *(t.name for t in trials)])),
        "compiles": info.get("compiles", 0),
        "groups": info.get("groups", []),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
