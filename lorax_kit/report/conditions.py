"""Groups trials into conditions, chooses a learning rate per rank, and makes the paired comparisons.

A condition is (targets, variant, alpha policy, other settings, rank, learning rate); its trials differ in the seed
only. A family is a condition without its rank and rate. Per family and rank **the rate is chosen on the metric of the
validation set and the result is reported on that of the test set**, so choosing does not flatter what is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lorax_kit.analysis.statistics.conditions import Comparison, Interval, compare, interval
from lorax_kit.report.measure import Measure
from lorax_kit.report.run_folder import Record, RunFolder
from lorax_kit.report.settings import rest_of, varying

if TYPE_CHECKING:
    from jaxtyping import Float

STOPPED = "stopped"
"""The status of a trial that was stopped early."""


class Family(NamedTuple):
    """What stays fixed along a rank ladder; `rest` names the other settings that differ within the run."""

    targets: str
    variant: str
    policy: str
    rest: str = ""

    def __str__(self) -> str:
        return ", ".join(part for part in self if part) or "all trials"


@dataclass(frozen=True)
class Condition:
    """The trials of one family, rank and learning rate; they differ in the seed."""

    family: Family
    rank: int
    lr: float
    trials: tuple[Record, ...]

    @property
    def key(self) -> tuple[str | int, ...]:
        """(targets, variant, policy, rest, rank): its name among the chosen conditions."""
        return (*self.family, self.rank)

    @property
    def done(self) -> tuple[Record, ...]:
        """Trials that finished."""
        return tuple(trial for trial in self.trials if trial["status"] == "done")

    def values(self, key: str) -> Float[np.ndarray, " n"]:
        """The finite values of `key` over finished trials, one per seed."""
        recorded = (trial.get(key) for trial in self.done)
        return np.array([v for v in recorded if v is not None and math.isfinite(v)], dtype=np.float64)

    def mean(self, key: str) -> float:
        """Mean of `key` over finished trials; nan if there is none."""
        values = self.values(key)
        return float(values.mean()) if values.size else math.nan

    def interval(self, key: str) -> Interval:
        """Mean and 95 % interval of `key` over seeds; nan if no trial finished."""
        values = self.values(key)
        return interval(values) if values.size else Interval(math.nan, math.nan, math.nan, "no finished trial")

    def first(self, key: str) -> float | None:
        """`key` of the first trial that has it: for numbers all seeds share, like `params`."""
        return next((trial[key] for trial in self.trials if trial.get(key) is not None), None)


@dataclass(frozen=True)
class Summary:
    """A run, grouped.

    Attributes:
      run: The folder it was read from.
      measure: The metric that the study chose by.
      metric: Its column of the test set, or of the validation set when no trial was tested.
      conditions: Every condition of rank > 0, in order of family, rank and rate.
      ladders: Per family, the chosen condition of each rank, by rank.
      probe: The rank-0 condition (frozen base, trained head) at its best rate, or None.
      best: The chosen condition with the best mean of `choice`, or None if nothing finished.
      comparisons: Every other chosen condition (and the probe) against `best`; `condition` holds
        (targets, variant, policy, rest, rank).
      margin: The largest change for the worse that does not matter, in its units; None where nobody said.
      notes: What the reader of the report must know about the data, one sentence each.
    """

    run: RunFolder
    measure: Measure
    metric: str
    conditions: tuple[Condition, ...]
    ladders: dict[Family, tuple[Condition, ...]]
    probe: Condition | None
    best: Condition | None
    comparisons: tuple[Comparison, ...]
    margin: float | None
    notes: tuple[str, ...]

    @property
    def choice(self) -> str:
        """The column that rates and ranks are chosen by: the metric's of the validation set."""
        return f"val_{self.measure.name}"

    @property
    def tested(self) -> bool:
        """Whether results are of the test set."""
        return self.metric.startswith("test_")

    @property
    def label(self) -> str:
        """The metric in words: "test accuracy"."""
        return f"{'test' if self.tested else 'validation'} {self.measure.word}"

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """All ranks above zero, ascending."""
        return tuple(sorted({condition.rank for condition in self.conditions}))

    @cached_property
    def rates(self) -> tuple[float, ...]:
        """All learning rates of adapted trials, ascending."""
        return tuple(sorted({condition.lr for condition in self.conditions}))

    @cached_property
    def failed(self) -> tuple[Record, ...]:
        """Trials that ended otherwise than by finishing or being stopped."""
        return tuple(trial for trial in self.run.trials if trial["status"] not in ("done", STOPPED))

    @cached_property
    def stopped(self) -> tuple[Record, ...]:
        """Trials that were stopped early, for being behind others: they enter no mean."""
        return tuple(trial for trial in self.run.trials if trial["status"] == STOPPED)

    @property
    def lost(self) -> str:
        """What happened to the seeds that no mean holds, in words."""
        words = ["diverged"] * bool(self.failed or not self.stopped) + ["were stopped early"] * bool(self.stopped)
        return " or ".join(words)

    @property
    def ladder(self) -> tuple[Condition, ...]:
        """The chosen conditions of the best condition's family (of the first one if nothing finished)."""
        if self.best is not None and self.best.family in self.ladders:
            return self.ladders[self.best.family]
        return next(iter(self.ladders.values()), ())

    def comparison(self, condition: Condition) -> Comparison | None:
        """How `condition` compares with `best`; None for `best` itself."""
        return next((c for c in self.comparisons if c.condition == condition.key), None)


def summarise(
    run: RunFolder,
    *,
    margin: float | None = None,
    names: Sequence[str] | None = None,
    measure: Measure | None = None,
) -> Summary:
    """Group the trials of a run; see `Summary`.

    The rate of a rank is the one with the best mean validation metric among the rates with the most
    finished seeds, so a rate that diverged for some seeds cannot win by its survivors. Of equal means the one with
    fewer parameters counts, then the one with the lower validation loss; `best` likewise.

    Args:
      margin: The largest change for the worse that does not matter, in its units; None: what `study.json` says, else a
        percentage point of a share, else none.
      names: The settings that families are told apart by; None: those that differ within the run.
      measure: The metric to choose and report by; None: the run's own.

    Raises:
      ValueError: A margin that is not above zero.
    """
    measure = measure or Measure.of(run.study)
    margin = measure.margin(run.study) if margin is None else margin
    if margin is not None and not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"margin is {margin:g}; it must be above zero: how much worse {measure.name!r} may be.")
    names = varying(run.trials) if names is None else names
    metric = f"val_{measure.name}"
    if any(t["status"] == "done" and t.get(f"test_{measure.name}") is not None for t in run.trials):
        metric = f"test_{measure.name}"
    adapted = _conditions([trial for trial in run.trials if trial["rank"] > 0], names)
    probes = _conditions([trial for trial in run.trials if trial["rank"] == 0], names)
    by_rank: dict[Family, dict[int, list[Condition]]] = {}
    for condition in adapted:
        by_rank.setdefault(condition.family, {}).setdefault(condition.rank, []).append(condition)
    ladders = {
        family: tuple(best_of(rates, measure) for _, rates in sorted(by_rank[family].items())) for family in by_rank
    }
    chosen = [condition for ladder in ladders.values() for condition in ladder]
    probe = best_of(probes, measure) if probes else None
    best = best_of(chosen, measure) if chosen else None
    if best is not None and not best.done:
        best = None
    notes = list(run.notes)
    compared = [*([probe] if probe else []), *chosen]
    for condition in compared:
        seeds = [trial["seed"] for trial in condition.trials]
        if len(set(seeds)) < len(seeds):
            notes.append(f"Rank {condition.rank} ({condition.family}) has several trials of the same seed.")
    comparisons: tuple[Comparison, ...] = ()
    if best is not None and best.values(metric).size:
        comparisons = compare_conditions(compared, metric, best)
    return Summary(run, measure, metric, tuple(adapted), ladders, probe, best, comparisons, margin, tuple(notes))


def compare_conditions(conditions: Sequence[Condition], metric: str, best: Condition) -> tuple[Comparison, ...]:
    """Every other condition against `best`, Holm-corrected over those given; each named by its `key`."""
    comparisons = compare(paired_rows(conditions), metric, ("condition",), against=(best.key,))
    return tuple(c._replace(condition=c.condition[0], against=c.against[0]) for c in comparisons)


def paired_rows(conditions: Iterable[Condition]) -> list[Record]:
    """The trials of conditions as rows to compare: "condition" is the `key`, and repeated seeds are numbered."""
    rows: list[Record] = []
    for condition in conditions:
        seeds = [trial["seed"] for trial in condition.trials]
        rows += [
            trial | {"condition": condition.key, "seed": (seed, seeds[:i].count(seed))}
            for i, (seed, trial) in enumerate(zip(seeds, condition.trials, strict=True))
        ]
    return rows


def differences(one: Condition, other: Condition, metric: str) -> Float[np.ndarray, " pairs"]:
    """one - other of the metric, over the seeds that finished in both."""
    by_seed: list[dict[Any, float]] = []
    for condition in (one, other):
        done = [row for row in paired_rows([condition]) if row["status"] == "done" and row.get(metric) is not None]
        by_seed.append({row["seed"]: row[metric] for row in done if math.isfinite(row[metric])})
    return np.array(
        [by_seed[0][seed] - by_seed[1][seed] for seed in by_seed[0] if seed in by_seed[1]], dtype=np.float64
    )


def at_every_rate(summary: Summary, condition: Condition) -> list[Condition]:
    """The conditions of the family and rank of one, at each learning rate that they were trained at."""
    return [c for c in summary.conditions if (c.family, c.rank) == (condition.family, condition.rank)]


def rates_tried(summary: Summary, condition: Condition) -> int:
    """How many learning rates the family and rank of a condition were trained at."""
    return len(at_every_rate(summary, condition))


def at_edge_of_grid(summary: Summary) -> tuple[Condition, ...]:
    """Chosen conditions of the headline ladder whose rate is the lowest or highest of three or more tried."""
    edges = []
    for condition in summary.ladder:
        tried = sorted(c.lr for c in at_every_rate(summary, condition))
        if condition.done and len(tried) >= 3 and condition.lr in (tried[0], tried[-1]):
            edges.append(condition)
    return tuple(edges)


def best_of(conditions: Sequence[Condition], measure: Measure) -> Condition:
    """The one with the best mean on validation data among those with the most finished seeds; see `summarise`."""
    choice = f"val_{measure.name}"
    most = max(condition.values(choice).size for condition in conditions)
    fullest = [c for c in conditions if c.values(choice).size == most]
    if not most:  # of those that never finished, the one that lasted longest
        return max(conditions, key=lambda c: (len(c.done), sum(trial.get("steps") or 0 for trial in c.trials)))
    return max(fullest, key=lambda c: (measure.sign * c.mean(choice), -(c.first("params") or 0), -c.mean("val_loss")))


def _conditions(trials: Sequence[Record], names: Sequence[str]) -> list[Condition]:
    groups: dict[tuple[Family, int, float], list[Record]] = {}
    policies = _alpha_policies(trials, names)
    for trial in trials:
        family = Family(*_setting(trial), policies[trial["trial"]], rest_of(trial, names))
        groups.setdefault((family, trial["rank"], trial["lr"]), []).append(trial)
    return [Condition(family, rank, lr, tuple(members)) for (family, rank, lr), members in sorted(groups.items())]


def _setting(trial: Record) -> tuple[str, str]:
    """Its targets and its variant."""
    return _name(trial["targets"]), _name(trial["variant"])


def _name(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "")


def _alpha_policies(trials: Iterable[Record], names: Sequence[str]) -> dict[str, str]:
    """Trial name -> "α = 16" (constant over ranks), "α = 2r" (proportional) or "α set per rank".

    The log holds numbers only; the policy is read off as the description with fewer distinct values.
    """
    groups: dict[tuple[str, ...], list[Record]] = {}
    for trial in trials:
        groups.setdefault((*_setting(trial), rest_of(trial, names)), []).append(trial)
    policies: dict[str, str] = {}
    for members in groups.values():
        known = [t for t in members if t["alpha"] is not None and t["rank"] > 0]
        constants = {t["alpha"] for t in known}
        ratios = {t["alpha"] / t["rank"] for t in known}
        per_rank = max((len({t["alpha"] for t in known if t["rank"] == r["rank"]}) for r in known), default=0)
        for trial in members:
            if trial["alpha"] is None or trial["rank"] == 0:
                policy = ""
            elif min(len(constants), len(ratios)) > per_rank == 1:
                policy = "α set per rank"
            elif len(constants) <= len(ratios):
                policy = f"α = {trial['alpha']:g}"
            else:
                ratio = trial["alpha"] / trial["rank"]
                policy = "α = r" if ratio == 1 else f"α = {ratio:g}r"
            policies[trial["trial"]] = policy
    return policies
