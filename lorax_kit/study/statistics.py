"""Intervals over seeds and paired comparisons of conditions (the only file that uses scipy).

A study compares conditions over the *same* seeds, so differences are paired. The test is the exact
sign-flip test: under the null hypothesis each of the n paired differences could as well have had the
opposite sign, so the p-value is a share of the 2^n sign patterns and its smallest value is 2^(1-n).
Five seeds therefore end at p = 0.0625; p < .05 needs at least six, and more once p-values are corrected.

Sources: Efron 1987 (BCa), Fisher 1935 (sign flips), Holm 1979, Dror et al. 2018 for their use here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats

RESAMPLES = 9999
EXACT_PAIRS = 16  # 2^16 sign patterns are enumerated; longer samples draw 99,999 of them
BOOTSTRAP_FROM = 6


class Interval(NamedTuple):
    """A mean, its confidence limits and, in words, how the limits were made."""

    mean: float
    low: float
    high: float
    method: str


class Comparison(NamedTuple):
    """One condition against the reference, over the seeds that finished in both.

    `difference` is mean(condition - against) in units of the metric, `low`/`high` its interval, `p` the
    sign-flip p-value and `p_holm` the same after Holm's correction over all comparisons of the call.
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


def _sample(values: ArrayLike) -> Float[np.ndarray, " n"]:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"expected a non-empty vector of values, got shape {x.shape}.")
    if not np.isfinite(x).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(x))} of {x.size} values are not finite.\n"
            "  next: drop failed trials first, and report how many there were."
        )
    return x


def interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of independent values (one per seed) with a confidence interval.

    Six values or more: BCa bootstrap with a fixed generator, so the same values give the same limits. Two
    to five: Student's t, because a bootstrap of so few values is far too narrow. One: no interval (nan).
    Identical values have no measurable spread; the limits are the mean itself and `method` says so.

    Args:
      values: (n,), finite.
      level: Coverage, e.g. 0.95.

    Returns:
      `Interval(mean, low, high, method)` in the units of `values`.

    Raises:
      ValueError: `values` is empty, not a vector, or holds a non-finite number.

    Example:
      >>> interval([1.0, 2.0, 3.0])[:3]  # 2 ± 4.3027 / sqrt(3)
      (2.0, -0.48..., 4.48...)

    Source: Efron, "Better bootstrap confidence intervals", JASA 1987.
    """
    x = _sample(values)
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, math.nan, math.nan, "one value, no interval")
    if np.ptp(x) <= 1e-12 * max(1.0, abs(mean)):
        return Interval(mean, mean, mean, f"{x.size} identical values")
    if x.size >= BOOTSTRAP_FROM:
        limits = stats.bootstrap(
            (x,),
            np.mean,
            n_resamples=RESAMPLES,
            confidence_level=level,
            method="BCa",
            rng=np.random.default_rng(0),
        ).confidence_interval
        if np.isfinite(limits).all():
            return Interval(mean, float(limits.low), float(limits.high), "BCa bootstrap")
    half = float(stats.t.ppf(0.5 + level / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size))
    return Interval(mean, mean - half, mean + half, f"Student t, n = {x.size}")


def paired_test(x: ArrayLike, y: ArrayLike) -> float:
    """Two-sided sign-flip test of mean(x - y) = 0; exact up to 16 pairs.

    The smallest p-value n pairs can give is 2^(1-n), so **p < .05 needs at least 6 pairs**, whatever
    the size of the effect (`smallest_p`). Beyond 16 pairs 99,999 sign patterns are drawn with a fixed
    generator.

    Args:
      x: (n,), one value per seed.
      y: (n,), the other condition's value for the same seeds, in the same order.

    Returns:
      The p-value, in (0, 1]; 1.0 for a single pair.

    Raises:
      ValueError: Different lengths, no pairs, or non-finite values.

    Example:
      >>> paired_test([2, 3, 4, 5, 6, 7], [1, 1, 1, 1, 1, 1])  # all six differ in the same direction
      0.03125

    Source: Fisher, "The Design of Experiments", 1935, section 21.
    """
    first, second = _sample(x), _sample(y)
    if first.size != second.size:
        raise ValueError(f"a paired test needs equal lengths, got {first.size} and {second.size}.")
    if first.size == 1:
        return 1.0
    result = stats.permutation_test(
        (first - second,),
        lambda d, axis: np.mean(d, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf if first.size <= EXACT_PAIRS else 99_999,
        batch=4096,
        alternative="two-sided",
        rng=np.random.default_rng(0),
    )
    return float(min(1.0, result.pvalue))


def smallest_p(pairs: int) -> float:
    """The smallest p-value the sign-flip test can give: 2^(1-pairs).

    Example:
      >>> smallest_p(5), smallest_p(6)
      (0.0625, 0.03125)
    """
    return min(1.0, 2.0 ** (1 - pairs))


def seeds_needed(comparisons: int = 1, level: float = 0.05) -> int:
    """Seeds below which Holm's correction over `comparisons` tests cannot give p < `level`.

    Example:
      >>> seeds_needed(1), seeds_needed(5)
      (6, 8)
    """
    pairs = 1
    while max(1, comparisons) * smallest_p(pairs) >= level:
        pairs += 1
    return pairs


def holm(pvalues: ArrayLike) -> Float[np.ndarray, " m"]:
    """Holm's step-down adjusted p-values, in the order given.

    Sorted ascending, p_(i) becomes max over j <= i of min(1, (m - j + 1) p_(j)). A nan (a comparison
    that could not be made) stays nan and does not count in m.

    Args:
      pvalues: (m,), in [0, 1] or nan.

    Raises:
      ValueError: A p-value outside [0, 1].

    Example:
      >>> holm([0.01, 0.04, 0.03]).tolist()
      [0.03, 0.06, 0.06]

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    p = np.asarray(pvalues, dtype=np.float64).reshape(-1)
    known = np.flatnonzero(~np.isnan(p))
    if ((p[known] < 0) | (p[known] > 1)).any():
        raise ValueError(f"p-values lie in [0, 1], got {p.tolist()}.")
    order = known[np.argsort(p[known], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    factors = np.arange(order.size, 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, factors * p[order]))
    return adjusted


def _usable(row: Mapping[str, Any], metric: str) -> bool:
    value = row.get(metric)
    return row.get("status", "done") == "done" and value is not None and math.isfinite(value)


def compare(
    rows: Sequence[Mapping[str, Any]],
    metric: str,
    by: Sequence[str],
    against: tuple[Any, ...] | None = None,
    *,
    better: str | None = None,
) -> list[Comparison]:
    """Each condition against one reference, paired by seed, with Holm-corrected p-values.

    Rows whose status is not "done" or whose metric is missing or not finite make no pair; they are counted
    in `unpaired`, never filled in. A difference is thus conditional on both trials having finished.

    With `against=None` the reference is the best mean among the conditions with the most usable seeds. It
    was then chosen from the data it is compared on, so small p-values against it are optimistic.

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
    if against is None and better not in ("higher", "lower"):
        raise ValueError(
            f"better is {better!r}; it must be 'higher' or 'lower', which chooses the reference.\n"
            f"  next: say when {metric!r} is better, or name the reference in `against`."
        )
    values: dict[tuple[Any, ...], dict[Any, float]] = {}
    seeds: dict[tuple[Any, ...], set[Any]] = {}
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
        if _usable(row, metric):
            values[condition][row["seed"]] = float(row[metric])
    if against is None:
        most = max((len(v) for v in values.values()), default=0)
        if most == 0:
            return []
        sign = 1.0 if better == "higher" else -1.0
        fullest = [c for c, v in values.items() if len(v) == most]
        against = max(fullest, key=lambda c: sign * float(np.mean(list(values[c].values()))))
    elif against not in values:
        raise ValueError(f"no trial of condition {against!r}; there are: {sorted(map(repr, values))}.")

    drafts = []
    for condition in values:
        if condition == against:
            continue
        paired = sorted(values[condition].keys() & values[against].keys())
        unpaired = len(seeds[condition] | seeds[against]) - len(paired)
        if not paired:
            gap = Interval(math.nan, math.nan, math.nan, "no pairs")
            drafts.append(Comparison(condition, against, 0, unpaired, *gap, math.nan, math.nan))
            continue
        x = np.array([values[condition][seed] for seed in paired])
        y = np.array([values[against][seed] for seed in paired])
        gap = interval(x - y)
        drafts.append(Comparison(condition, against, len(paired), unpaired, *gap, paired_test(x, y), math.nan))
    corrected = holm([draft.p for draft in drafts])
    return [draft._replace(p_holm=float(p)) for draft, p in zip(drafts, corrected, strict=True)]
