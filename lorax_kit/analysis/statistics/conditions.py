"""Statistics over seeds: each condition against a reference, and the smallest condition that is good enough.

A study compares conditions over the *same* seeds, so differences are paired. `interval`, `over_examples` (the test
set's own error) and `seeds_to_tell` (power) come from `intervals`, `paired_test` and `holm` from `paired`.

A rank's learning rate is chosen by its mean validation value, and the test values of that rate are compared. What
the choice does depends on the share of a trial's variance that validation and test have in common, since a seed that
trains well is good on both. Simulated with four equal ranks at three rates (tests/analysis/test_procedure.py):

    common share                                                                0     1/2      1
    coverage, a rank's chosen rate, n = 3 to 20                              0.957  0.955   0.94
    coverage, the best of all ranks and rates, n = 6                         0.958  0.923   0.82
    coverage, the best of all ranks and rates, n = 20                        0.958  0.916   0.79
    a false claim by Holm's correction, against a rank fixed beforehand      0.044  0.034  0.010
    a false claim by Holm's correction, against the best on validation       0.043  0.039  0.020

The comparisons thus hold, and so does the interval of every rank. The best of all is flattered: with half and all in
common, its mean is 0.3 and 0.7 standard deviations too high at n = 6, and more seeds do not mend its interval; seeds
that took no part in the choice do. Every condition must have tried the same number of rates: six against one, with
all in common, make a false claim in 9 % of studies.

Sources: Dror et al. 2018 (paired tests and their corrections in this field).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lorax_kit.analysis.statistics.intervals import (
    Interval,
    SeedsToTell,
    interval,
    limits,
    over_examples,
    seeds_to_tell,
    unpaired,
)
from lorax_kit.analysis.statistics.paired import holm, paired_test, seeds_needed, sign_flips, smallest_p

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = [
    "Comparison",
    "Interval",
    "NonInferior",
    "Rung",
    "SeedsToTell",
    "compare",
    "holm",
    "interval",
    "limits",
    "non_inferior",
    "over_examples",
    "paired_test",
    "seeds_needed",
    "seeds_to_tell",
    "sign_flips",
    "smallest_p",
    "unpaired",
]

Condition = tuple[Any, ...]


class Comparison(NamedTuple):
    """One condition against the reference, over the seeds that finished in both.

    `difference` is mean(condition - against) in units of the metric, `low`/`high` its interval, `p` the
    sign-flip p-value and `p_holm` the same after Holm's correction, see `compare`.
    `unpaired` counts the seeds seen in either condition that have no usable pair (failed or missing).
    Without a pair the numbers are nan.
    """

    condition: tuple[Any, ...]
    against: tuple[Any, ...]
    pairs: int
    unpaired: int
    difference: float
    low: float
    high: float
    method: str
    p: float
    p_holm: float


class Rung(NamedTuple):
    """One condition of a ladder against the reference, over the seeds that finished in both.

    `difference` is mean(condition - against) in units of the metric and `bound` its worse confidence limit: the lower
    one where higher is better. `holds` says that the condition is claimed to be not inferior by the margin.
    """

    condition: Condition
    against: Condition
    pairs: int
    unpaired: int
    difference: float
    bound: float
    method: str
    holds: bool


class NonInferior(NamedTuple):
    """The cheapest condition that is not inferior (the reference itself where no rung holds), and every rung."""

    smallest: Condition
    margin: float
    rungs: tuple[Rung, ...]


def compare(
    rows: Sequence[Mapping[str, Any]],
    metric: str,
    by: Sequence[str],
    against: Condition | None = None,
    *,
    better: str | None = None,
) -> list[Comparison]:
    """Each condition against one reference, paired by seed, with Holm-corrected p-values.

    Holm's correction is over all comparisons of the call. Rows whose status is not "done" or whose metric is missing or
    not finite make no pair; they are counted in `unpaired`, never filled in. A difference is thus conditional on both
    trials having finished.

    With `against=None` the reference is the best mean among the conditions with the most usable seeds. Choosing it by
    the numbers it is compared on is paid for: Holm's correction is then over all pairs of conditions. Corrected over
    the comparisons alone, a false claim would be made in 7 % of studies of four conditions, and 9 % of six (simulated).

    Args:
      rows: Trials, mappings with "seed", `metric`, the keys in `by`, and optionally "status".
      metric: Key of the compared number.
      by: Keys whose values name a condition, e.g. ("variant", "rank").
      against: Values of `by` naming the reference condition.
      better: "higher" or "lower", which chooses the reference; not needed where `against` names it.

    Returns:
      One `Comparison` per condition other than the reference, in the order of first appearance; empty
      if no row is usable.

    Raises:
      ValueError: Two rows of one condition share a seed, `against` names no condition, or without it `better` is
        neither "higher" nor "lower".

    Example:
      >>> rows = [{"rank": r, "seed": s, "acc": 0.1 * r + 0.01 * s} for r in (1, 2) for s in range(6)]
      >>> [(c.condition, c.against, c.p) for c in compare(rows, "acc", ("rank",), better="higher")]
      [((1,), (2,), 0.03125)]
    """
    values, seeds = _by_condition(rows, metric, by)
    others: list[float] = []  # p-values of the pairs without the reference, where it is chosen from the data
    if against is None:
        sign = _sign(better, metric, "chooses the reference")
        most = max((len(v) for v in values.values()), default=0)
        if most == 0:
            return []
        fullest = [c for c, v in values.items() if len(v) == most]
        against = max(fullest, key=lambda c: sign * float(np.mean(list(values[c].values()))))
        for x, y in combinations([v for c, v in values.items() if c != against], 2):
            d = _differences(x, y)
            others.append(float(sign_flips(d)) if d.size else math.nan)
    _check_known([against], values)
    drafts = []
    for condition in values:
        if condition == against:
            continue
        d = _differences(values[condition], values[against])
        unpaired = len(seeds[condition] | seeds[against]) - d.size
        p = float(sign_flips(d)) if d.size else math.nan
        drafts.append(Comparison(condition, against, d.size, unpaired, *_gap(d), p, math.nan))
    corrected = holm([draft.p for draft in drafts] + others)
    return [draft._replace(p_holm=float(p)) for draft, p in zip(drafts, corrected, strict=False)]


def non_inferior(
    rows: Sequence[Mapping[str, Any]],
    metric: str,
    by: Sequence[str],
    against: Condition,
    *,
    margin: float,
    better: str,
    ladder: Sequence[Condition] | None = None,
    level: float = 0.95,
) -> NonInferior:
    """The smallest condition that is worse than the reference by less than a margin stated beforehand.

    A rung holds if the worse limit of its paired difference's interval lies within the margin: a one-sided test at
    (1 - level) / 2, 2.5 %. The ladder is climbed down from the reference and left at the first rung that fails; in such
    a fixed sequence the chance of any false claim stays that of one test, without a correction. Identical differences
    have no limits and fail.

    False claims at the margin itself, where 2.5 % are meant at most (simulated): 1.8 to 2.2 % for normal and discrete
    differences, and for those of two skewed conditions; 0.7 to 2.2 % where the rate of every condition was chosen among
    three. Differences with a long tail of losses (gamma of shape 4) reach 4.7 %.

    Args:
      rows, metric, by: As for `compare`; failed trials make no pair, and a rung without an interval fails.
      against: Values of `by` naming the reference, e.g. the largest rank.
      margin: The largest change for the worse that does not matter, in units of the metric, above zero.
      better: "higher" or "lower".
      ladder: The conditions to try, the one nearest to the reference first. None where `by` is a single key: those
        below the reference, in descending order.
      level: Of the two-sided interval whose worse limit is used.

    Returns:
      `NonInferior(smallest, margin, rungs)`; a rung after the first failing one has numbers, but does not hold.

    Raises:
      ValueError: A margin not above zero, an unknown condition, `ladder` missing where `by` has several keys, or
        what `compare` raises.

    Example:
      >>> accuracy = {1: (0.70, 0.72, 0.69, 0.71), 4: (0.80, 0.81, 0.79, 0.82), 8: (0.81, 0.81, 0.80, 0.82)}
      >>> rows = [{"rank": r, "seed": s, "acc": a} for r, seeds in accuracy.items() for s, a in enumerate(seeds)]
      >>> found = non_inferior(rows, "acc", ("rank",), (8,), margin=0.02, better="higher")
      >>> found.smallest, [(r.condition, round(r.bound, 3), r.holds) for r in found.rungs]
      ((4,), [((4,), -0.015, True), ((1,), -0.118, False)])

    Source: Maurer, Hothorn & Lehmacher, "Multiple comparisons in drug clinical trials", 1995 (fixed sequences).
    """
    sign = _sign(better, metric, "says which limit is the worse one")
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"margin is {margin}; it must be above zero: how much worse {metric!r} may be.")
    values, seeds = _by_condition(rows, metric, by)
    if ladder is None:
        if len(by) != 1:
            raise ValueError(
                f"conditions by {', '.join(by)} have no order of their own.\n"
                "  next: give `ladder`, the conditions to try from the one nearest to the reference on."
            )
        ladder = sorted((c for c in values if c < against), reverse=True)
    _check_known([against, *ladder], values)
    smallest, rungs, unbroken = against, [], True
    for condition in ladder:
        d = _differences(values[condition], values[against])
        gap = _gap(d, level)
        bound = gap.low if sign > 0 else gap.high
        unbroken = unbroken and sign * bound > -margin  # False for nan
        unpaired = len(seeds[condition] | seeds[against]) - d.size
        rungs.append(Rung(condition, against, d.size, unpaired, gap.mean, bound, gap.method, unbroken))
        smallest = condition if unbroken else smallest
    return NonInferior(smallest, margin, tuple(rungs))


def _sign(better: str | None, metric: str, purpose: str) -> float:
    if better not in ("higher", "lower"):
        raise ValueError(
            f"better is {better!r}; it must be 'higher' or 'lower', which {purpose}.\n"
            f"  next: say when {metric!r} is better."
        )
    return 1.0 if better == "higher" else -1.0


def _by_condition(
    rows: Iterable[Mapping[str, Any]], metric: str, by: Sequence[str]
) -> tuple[dict[Condition, dict[Any, float]], dict[Condition, set[Any]]]:
    """Condition -> its usable values by seed, and condition -> all seeds seen."""
    values: dict[Condition, dict[Any, float]] = {}
    seeds: dict[Condition, set[Any]] = {}
    for row in rows:
        condition = tuple(row[key] for key in by)
        seen = seeds.setdefault(condition, set())
        if row["seed"] in seen:
            raise ValueError(
                f"condition {dict(zip(by, condition, strict=True))} has two trials with seed {row['seed']}.\n"
                f"  next: name in `by` what sets them apart (now {', '.join(by)})."
            )
        seen.add(row["seed"])
        values.setdefault(condition, {})
        value = row.get(metric)
        if row.get("status", "done") == "done" and value is not None and math.isfinite(value):
            values[condition][row["seed"]] = float(value)
    return values, seeds


def _check_known(conditions: Iterable[Condition], values: Mapping[Condition, Any]) -> None:
    for condition in conditions:
        if condition not in values:
            raise ValueError(f"no trial of condition {condition!r}; there are: {sorted(map(repr, values))}.")


def _differences(x: Mapping[Any, float], y: Mapping[Any, float]) -> Float[np.ndarray, " pairs"]:
    """x - y over the seeds of both."""
    return np.array([x[seed] - y[seed] for seed in sorted(x.keys() & y.keys())], dtype=np.float64)


def _gap(differences: Float[np.ndarray, " pairs"], level: float = 0.95) -> Interval:
    return interval(differences, level) if differences.size else Interval(math.nan, math.nan, math.nan, "no pairs")
