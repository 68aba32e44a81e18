"""Two or more runs side by side: in what they differ, and what each of their common conditions came to."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lorax_kit.analysis.statistics.conditions import Comparison, Interval, compare, holm, unpaired
from lorax_kit.report.conditions import Condition, Summary, paired_rows, summarise
from lorax_kit.report.measure import Measure, measures
from lorax_kit.report.run_folder import RunFolder, RunFolderError, read_run
from lorax_kit.report.settings import varying

SAME = ("problem", "base", "data")
"""What two runs must share for their seeds to be pairs: keys of the identity in `study.json`."""


class Cell(NamedTuple):
    """A condition of one run in a row.

    Attributes:
      side: index of the run.
      condition: at the rate that its run chose on validation data.
      difference: to the first run's condition, in units of the metric, with its interval; None for the first run.
      pairs: the seeds it is paired over; 0 where the samples are taken as independent.
      p, p_holm: of the sign-flip test, and corrected over all cells; nan without pairs.
    """

    side: int
    condition: Condition
    difference: Interval | None = None
    pairs: int = 0
    p: float = math.nan
    p_holm: float = math.nan


class Row(NamedTuple):
    """A condition that the first run shares with others: its setting in words, its rank, a cell per run."""

    setting: str
    rank: int
    cells: tuple[Cell, ...]


class Together(NamedTuple):
    """Runs side by side.

    Attributes:
      names: of the runs, each once.
      sides: their summaries, by one common metric on one part of the data.
      differing: (section, name, text per run) of what is recorded and differs.
      rows: conditions that the first run shares with another.
      best: one row: the best condition of each run.
      by_rank: whether rows match by rank alone, since no setting is the same in two runs.
      same: per run, whether problem, base and data are those of the first, so that seeds are pairs.
    """

    names: tuple[str, ...]
    sides: tuple[Summary, ...]
    differing: tuple[tuple[str, str, tuple[str, ...]], ...]
    rows: tuple[Row, ...]
    best: Row | None
    by_rank: bool
    same: tuple[bool, ...]


def read_together(run_dirs: Sequence[str | os.PathLike[str]], *, margin: float | None = None) -> Together:
    """Read runs and compare what they have in common; the first one is what the others are compared with.

    Raises:
      RunFolderError: Fewer than two folders, one of them twice, one that is no run, or no metric in common.
      ValueError: A margin that is not above zero.
    """
    paths = [Path(one).resolve() for one in run_dirs]
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise RunFolderError(f"side by side go two or more different run folders, not {', '.join(map(str, run_dirs))}.")
    runs = [read_run(one) for one in run_dirs]
    measure = _common(runs)
    settings = varying([trial for run in runs for trial in run.trials])
    sides = [summarise(run, margin=margin, names=settings, measure=measure) for run in runs]
    part = "test" if all(side.tested for side in sides) else "val"
    sides = [replace(side, metric=f"{part}_{measure.name}") for side in sides]
    same = tuple(_same(runs[0], run) for run in runs)
    rows, by_rank = _rows(sides, same)
    best = None
    if all(side.best is not None and side.best.values(side.metric).size for side in sides):
        cells = _cells([(k, side.best) for k, side in enumerate(sides) if side.best], sides, same)
        best = _corrected([Row("the best of each run", 0, cells)])[0]
    return Together(_names(runs), tuple(sides), _differing(runs), rows, best, by_rank, same)


def _common(runs: Sequence[RunFolder]) -> Measure:
    """The metric to compare by: one run's own that all have, the first run's before others."""
    shared = [one for one in measures(runs[0].study) if all(_has(run, one) for run in runs)]
    for run in runs:
        chief = Measure.of(run.study)
        for one in shared:
            if one.name == chief.name:
                return one
    if shared:
        return shared[0]
    named = "; ".join(f"'{run.path}' has {', '.join(one.name for one in measures(run.study))}" for run in runs)
    raise RunFolderError(f"these runs have no metric of one name and direction in common: {named}.")


def _has(run: RunFolder, measure: Measure) -> bool:
    column = f"val_{measure.name}"
    known = any((one.name, one.better) == (measure.name, measure.better) for one in measures(run.study))
    return known and any(trial.get(column) is not None for trial in run.trials)


def _same(one: RunFolder, other: RunFolder) -> bool:
    """Whether two runs are of the same problem, base and data; what was not recorded is not taken to be the same."""
    first, second = (run.study.get("identity") or {} for run in (one, other))
    return all(first.get(key) is not None and first.get(key) == second.get(key) for key in SAME)


def _rows(sides: Sequence[Summary], same: Sequence[bool]) -> tuple[tuple[Row, ...], bool]:
    def usable(side: Summary) -> list[Condition]:
        return [c for ladder in side.ladders.values() for c in ladder if c.values(side.metric).size]

    def exact(c: Condition) -> tuple[Any, ...]:
        return (c.family.targets, c.family.variant, c.family.rest, c.rank, c.first("alpha"))

    def rank(c: Condition) -> tuple[Any, ...]:
        return (c.rank,)

    ways = [exact] + [rank] * all(len(side.ladders) == 1 for side in sides)
    for key in ways:
        by_key = [{key(c): c for c in usable(side)} for side in sides]
        rows = []
        for name, condition in by_key[0].items():
            beside = [(k, conditions[name]) for k, conditions in enumerate(by_key) if name in conditions]
            if len(beside) > 1:
                setting = str(condition.family) if key is exact else "each run's own setting"
                rows.append(Row(setting, condition.rank, _cells(beside, sides, same)))
        if rows:
            return _corrected(rows), key is rank
    return (), False


def _cells(
    conditions: Sequence[tuple[int, Condition]], sides: Sequence[Summary], same: Sequence[bool]
) -> tuple[Cell, ...]:
    (_, first), *others = conditions
    metric = sides[0].metric
    cells = [Cell(conditions[0][0], first)]
    for side, condition in others:
        comparison = _paired(first, condition, metric) if same[side] else None
        if comparison is not None and comparison.pairs:
            gap = Interval(comparison.difference, comparison.low, comparison.high, comparison.method)
            cells.append(Cell(side, condition, gap, comparison.pairs, comparison.p))
        else:
            cells.append(Cell(side, condition, unpaired(condition.values(metric), first.values(metric))))
    return tuple(cells)


def _paired(first: Condition, other: Condition, metric: str) -> Comparison:
    sides = {"first": first, "other": other}
    rows = [trial | {"condition": name} for name, c in sides.items() for trial in paired_rows([c])]
    (comparison,) = compare(rows, metric, ("condition",), against=("first",))
    return comparison


def _corrected(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows with Holm's correction over all their cells."""
    adjusted = iter(holm([cell.p for row in rows for cell in row.cells]))
    return tuple(
        row._replace(cells=tuple(cell._replace(p_holm=float(next(adjusted))) for cell in row.cells)) for row in rows
    )


def _differing(runs: Sequence[RunFolder]) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    differing = []
    for section, values in _sections(runs).items():
        names = dict.fromkeys(name for one in values for name in one)
        for name in names:
            texts = tuple(_text(one.get(name)) for one in values)
            if len(set(texts)) > 1:
                differing.append((section, name, texts))
    return tuple(differing)


def _sections(runs: Sequence[RunFolder]) -> dict[str, list[dict[str, Any]]]:
    def identity(run: RunFolder, *keys: str) -> dict[str, Any]:
        known = run.study.get("identity") or {}
        return {key: str(known[key])[:12] for key in keys if known.get(key) is not None}

    return {
        "design": [_flat(run.study.get("design")) for run in runs],
        "problem": [identity(run, "problem") | _flat(run.study.get("task")) for run in runs],
        "base": [identity(run, "base") for run in runs],
        "data": [identity(run, "data") for run in runs],
        "environment": [_flat(run.study.get("environment")) for run in runs],
    }


def _flat(value: Any, before: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(value, Mapping):
        return {before: value} if before else {}
    items: dict[str, Any] = {}
    for key, item in value.items():
        items |= _flat(item, f"{before}.{key}" if before else str(key))
    return items


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _names(runs: Sequence[RunFolder]) -> tuple[str, ...]:
    """The runs' names; by their folders where two are equal."""
    names = tuple(str(run.study.get("name") or run.path.resolve().name) for run in runs)
    return names if len(set(names)) == len(names) else tuple(str(run.path) for run in runs)
