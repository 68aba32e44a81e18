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
from lorax_kit.study.folder.shared import SharedStore
from lorax_kit.study.folder.store import RunStore
from lorax_kit.study.machines import Machines
from lorax_kit.study.programs.forms import Examples, Stack, kinds, stacks, union_plan
from lorax_kit.study.programs.groups import Group, grouped


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


def planned_groups(
    study: Study,
    problem: Problem,
    planned: Sequence[Stack],
    store: RunStore | SharedStore,
    params: Params,
    examples: Examples,
    machines: Machines,
) -> tuple[list[list[Group]], list[dict[str, Any]]]:
    """(groups to train, of each stack; records of how stacks were packed, those of earlier calls among them).

    Raises:
      StudyError: a trial that does not fit the memory.
    """
    budget, devices, workers = machines
    records: list[dict[str, Any]] = list(store.info.get("stacks") or [])
    by_stack: list[list[Group]] = []
    for stack in planned:
        for part, earlier in unfinished(study, problem, stack, store, params, examples(stack.form)):
            base, batch = cast(params, part.form.dtype), examples(part.form)
            groups = grouped(
                study, problem, part, base, batch, budget=budget, devices=devices, parts=workers, earlier=earlier
            )
            names, layout = [trial.name for trial in part.trials], groups[0].layout
            record = {"trials": names, "size": layout.size, "at_once": layout.at_once}
            records = [record if one["trials"] == names else one for one in records]
            records += [record] if record not in records else []
            # A group of which a trial is missing goes on as a whole: the same program, so the same bits.
            if study.stop is None:
                groups = [group for group in groups if any(t.name not in store.finished for t in group.trials)]
            by_stack.append(groups)
    if study.stop is not None and all(t.name in store.finished for stack in planned for t in stack.trials):
        return [], records
    return by_stack, records


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
) -> list[tuple[Stack, tuple[int, int | None] | None]]:
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
    out: list[tuple[list[Trial], tuple[int, int | None] | None]] = []
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


def _sizes(record: Mapping[str, Any]) -> tuple[int, int | None]:
    """(size, at_once) of a stack's packs; of a folder made before there were slices, None: all at once."""
    return record["size"], record.get("at_once")
