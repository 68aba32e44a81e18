"""What a call of `lk.run` will train: stacks of trials, those of an earlier call as they were planned then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorax_kit.core.paths import Params
from lorax_kit.errors import StudyError
from lorax_kit.problem import Problem
from lorax_kit.problem.base import cast
from lorax_kit.study.design.study import Study
from lorax_kit.study.design.trial import Trial
from lorax_kit.study.programs.forms import Examples, Stack, kinds, stacks, union_plan
from lorax_kit.study.shared_store import SharedStore
from lorax_kit.study.store import RunStore


def planned_stacks(
    study: Study, problem: Problem, trials: Sequence[Trial], params: Params, examples: Examples
) -> list[Stack]:
    """The stacks of all trials: what shares a program.

    Raises:
      StudyError, PlanError: settings that do not fit the problem, the optimiser or the model.
    """
    out = []
    for some, form in kinds(study, problem, trials):
        base = cast(params, form.dtype)
        out += stacks(study, problem, some, form, base, examples(form))
    return out


def check_rows(trials: Sequence[Trial], finished: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `StudyError` where a folder's row of a trial's name is of other settings."""
    for trial in trials:
        row = finished.get(trial.name, {})
        for name, value in trial.columns().items():
            if name in row and row[name] != value:
                raise StudyError(
                    f"trial {trial.name!r} of the folder has {name} {row[name]!r}, and of this study {value!r}: values "
                    "differ too little to tell by name.\n  choose another folder"
                )


def check_race(trials: Sequence[Trial], info: Mapping[str, Any], folder: str) -> None:
    """Raise `StudyError` unless a folder with a stopping rule holds these trials, or none yet.

    Trials were stopped beside the others of their race: those that come later would not have been judged alike.
    """
    known = {name for record in info.get("stacks") or () for name in record["trials"]}
    if known and known != {trial.name for trial in trials}:
        raise StudyError(
            f"{folder!r} holds a study that stops trials early, and those were compared with each other: it does not "
            "grow.\n  choose another folder for other trials, or a study without stop"
        )


def unfinished(
    study: Study, problem: Problem, stack: Stack, store: RunStore | SharedStore, params: Params, batch: Any
) -> list[tuple[Stack, tuple[int, int] | None]]:
    """What of a stack is to be trained: parts that an earlier call began as they were planned then, and what is new.

    A part is planned once, by the trials that were missing when it was: so a folder that grows goes on with what was
    under way by the same program, to the same bits: with the (size, at_once) of its pack.
    """
    if study.stop is not None:  # all trials of a race decide who goes on: it is run again as it was planned
        sizes = {tuple(record["trials"]): _sizes(record) for record in store.info.get("stacks") or ()}
        whole = sizes.get(tuple(trial.name for trial in stack.trials))
        return [(stack, whole)]
    by_name = {trial.name: trial for trial in stack.trials}
    missing = [name for name in by_name if name not in store.finished]
    out: list[tuple[list[Trial], tuple[int, int] | None]] = []
    for record in store.info.get("stacks") or ():
        names = record["trials"]
        if set(names) <= set(by_name) and set(names) & set(missing):
            out.append(([by_name[name] for name in names], _sizes(record)))
            missing = [name for name in missing if name not in names]
    if missing:
        out.append(([by_name[name] for name in missing], None))
    base = cast(params, stack.form.dtype)
    return [
        (
            stack
            if len(some) == len(stack.trials)
            else stack._replace(trials=some, plan=union_plan(study, problem, some, base, batch)),
            size,
        )
        for some, size in out
    ]


def _sizes(record: Mapping[str, Any]) -> tuple[int, int]:
    """(size, at_once) of a stack's packs; of a folder made before there were slices, all at once."""
    return record["size"], record.get("at_once", record["size"])
