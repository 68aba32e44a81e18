"""Intervals over seeds and over test examples, and how many seeds would tell a difference (the only file with scipy).

`interval` is Student's t corrected for skewness. T = sqrt(n) (mean - mu) / s of a skewed sample is not Student's;
Hall's cubic makes it nearly so, and is monotone, so its inverse turns Student's quantiles q into limits:

    g(T) = T + a T^2 / 3 + a^2 T^3 / 27 + a / 6,   a = w skewness / sqrt(n),
    limits = mean - s g^-1(±q) / sqrt(n),   g^-1(u) = 3 ((1 + a (u - a / 6))^(1/3) - 1) / a

Two constants hold the coverage at 93 to 97 % from three values on. The weight w is 1/2: the whole skewness of three
values is noise that doubles the width, and lets values with two heavy tails fall to 93 %. The quantile is that of 0.85
of the error, because at the whole error lognormal values are covered 92.2 %; on normal values that costs 5 % of width.

Coverage of 95 % intervals, 100,000 samples each (`python experiments/coverage.py` prints every n from 3 to 20):

    n                                     3      4      5      6      8     10     12     15     20
    normal                              0.960  0.958  0.957  0.957  0.957  0.957  0.956  0.958  0.957
    gamma, shape 4 (skewness 1)         0.949  0.946  0.945  0.945  0.948  0.949  0.949  0.951  0.953
    lognormal, sigma 0.5 (1.75)         0.937  0.931  0.932  0.933  0.935  0.938  0.940  0.943  0.946
    accuracy of 1,000 examples, 0.8     0.960  0.959  0.958  0.957  0.956  0.958  0.957  0.957  0.957
    accuracy of 60 examples, 0.9        0.963  0.955  0.966  0.955  0.956  0.957  0.955  0.957  0.956
    beyond the promise: exponential     0.910  0.909  0.911  0.915  0.922  0.929  0.932  0.935  0.940

Student's t covers the lognormal 0.916 to 0.931. BCa and the bootstrap of T (4,000 samples) cover it 0.84 and 0.93 at
n = 6, 0.91 and 0.94 at n = 20; at n = 4 the bootstrap of T is twice as wide as Student's interval.

Sources: Hall, "On the removal of skewness by transformation", JRSS B 1992; Wilson 1927 (shares).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaincinv, ndtr, ndtri, stdtrit

if TYPE_CHECKING:
    from jaxtyping import Float

SKEWNESS_WEIGHT = 0.5
ERROR_SHARE = 0.85


class Interval(NamedTuple):
    """A mean, its confidence limits and, in words, how the limits were made."""

    mean: float
    low: float
    high: float
    method: str


class SeedsToTell(NamedTuple):
    """Seeds that would tell a difference: at the spread seen, and at the ends of that spread's 95 % interval."""

    seeds: int
    low: int
    high: int
    sd: float


def sample(values: ArrayLike) -> Float[np.ndarray, " n"]:
    """`values` as a float64 vector.

    Raises:
      ValueError: `values` is empty, not a vector, or holds a non-finite number.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"expected a non-empty vector of values, got shape {x.shape}.")
    if not np.isfinite(x).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(x))} of {x.size} values are not finite.\n"
            "  next: drop failed trials first, and report how many there were."
        )
    return x


def limits(
    samples: Float[np.ndarray, "*batch n"], level: float = 0.95
) -> tuple[Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch"]]:
    """Limits of the mean of many samples at once, as `interval` gives them for one.

    Args:
      samples: (*batch, n), finite; every row of n values is a sample.
      level: Coverage, e.g. 0.95.

    Returns:
      The lower and the upper limits, (*batch,) each; nan where all n values are identical or n is 1.

    Raises:
      ValueError: `level` is not between 0 and 1.

    Example:
      >>> low, high = limits(np.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
      >>> low.round(3).tolist(), high.round(3).tolist()
      ([-0.71, nan], [4.71, nan])
    """
    _check_coverage(level)
    x = np.asarray(samples, dtype=np.float64)
    exponent = _exponent(x)
    x = np.ldexp(x, -exponent[..., None])
    n, mean = x.shape[-1], x.mean(axis=-1)
    spread = _spread(x)
    if n == 1:
        return np.full(mean.shape, np.nan), np.full(mean.shape, np.nan)
    deviation = x - mean[..., None]
    variance = np.where(spread, np.mean(deviation**2, axis=-1), np.nan)
    a = SKEWNESS_WEIGHT * np.mean(deviation**3, axis=-1) / variance**1.5 / math.sqrt(n)
    error = np.sqrt(variance / (n - 1))  # s / sqrt(n), s with n - 1
    quantile = -stdtrit(n - 1, ERROR_SHARE * (1 - level) / 2)

    def inverse(u: float) -> Float[np.ndarray, "*batch"]:
        root = np.cbrt(1 + a * (u - a / 6))
        return 3 * (u - a / 6) / (root * root + root + 1)  # = 3 (root - 1) / a, and right at a = 0

    return np.ldexp(mean - error * inverse(quantile), exponent), np.ldexp(mean - error * inverse(-quantile), exponent)


def _check_coverage(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; a coverage lies between 0 and 1, e.g. 0.95.")


def _exponent(x: Float[np.ndarray, "*batch n"]) -> Any:
    """Of the power of two in whose units no square or cube of values leaves the range of float64; exact, too."""
    return np.frexp(np.abs(x).max(axis=-1))[1]


def _spread(x: Float[np.ndarray, "*batch n"]) -> Any:
    """Whether values differ by more than they are rounded to."""
    return np.ptp(x, axis=-1) > 1e-12 * np.abs(x).max(axis=-1)


def interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of independent values (one per seed) with a confidence interval.

    It says where the mean over all seeds lies, on these test examples; what other examples would change is
    `over_examples`. Identical values show no spread, which does not mean that there is none: then, and for a
    single value, the limits are nan and `method` says why.

    The coverage of 95 % is simulated for normal, moderately skewed and discrete values (top of this file). It is less
    where the tail is long (exponential 0.91 to 0.94) and where one seed in ten fails by six standard deviations (0.87
    to 0.94). Values of two or three levels, as accuracies of 30 examples near 95 %, are covered anything from 0.91 up.

    Args:
      values: (n,), finite.
      level: Coverage, e.g. 0.95.

    Returns:
      `Interval(mean, low, high, method)` in the units of `values`.

    Raises:
      ValueError: `values` is empty, not a vector, or holds a non-finite number, or `level` is not in (0, 1).

    Example:
      >>> interval([0.81, 0.83, 0.84, 0.82, 0.88])  # skewed to the right, and so is the interval
      Interval(mean=0.836, low=0.80..., high=0.88..., method='t corrected for skewness, n = 5')

    Source: Hall, "On the removal of skewness by transformation", JRSS B 1992.
    """
    x = sample(values)
    low, high = (float(limit) for limit in limits(x, level))
    method = f"t corrected for skewness, n = {x.size}"
    if math.isnan(low):
        method = "one value, no interval" if x.size == 1 else f"{x.size} identical values, no spread seen, no interval"
    return Interval(float(x.mean()), low, high, method)


def unpaired(x: ArrayLike, y: ArrayLike, level: float = 0.95) -> Interval:
    """Difference of the means of independent samples of unequal spread: Welch's interval of mean(x) - mean(y).

    For runs that share no seeds or no data; where they do, the interval of the paired differences is narrower. Normal
    values are covered 94 to 97 % from three per sample on (tests/analysis/test_intervals.py).

    Args:
      x, y: (n,) and (m,), finite, one value per seed.
      level: Coverage, e.g. 0.95.

    Returns:
      `Interval(difference, low, high, method)`; the limits are nan where a sample has one value, or neither has spread.

    Raises:
      ValueError: A sample is empty, not a vector, or holds a non-finite number, or `level` is not in (0, 1).

    Example:
      >>> unpaired([0.81, 0.83, 0.84], [0.78, 0.80, 0.79])
      Interval(mean=0.036..., low=0.005..., high=0.067..., method='Welch, n = 3 and 3')

    Source: Welch, "The generalization of Student's problem", Biometrika 1947.
    """
    _check_coverage(level)
    first, second = sample(x), sample(y)
    difference, sizes = float(first.mean() - second.mean()), f"n = {first.size} and {second.size}"
    if min(first.size, second.size) < 2:
        return Interval(difference, math.nan, math.nan, f"one value, no interval, {sizes}")
    if not (_spread(first) or _spread(second)):
        return Interval(difference, math.nan, math.nan, f"no spread seen, no interval, {sizes}")
    exponent = int(max(_exponent(first), _exponent(second)))
    parts = [float(np.ldexp(values, -exponent).var(ddof=1)) / values.size for values in (first, second)]
    freedom = sum(parts) ** 2 / sum(p**2 / (v.size - 1) for p, v in zip(parts, (first, second), strict=True))
    half = float(np.ldexp(-stdtrit(freedom, (1 - level) / 2) * math.sqrt(sum(parts)), exponent))
    return Interval(difference, difference - half, difference + half, f"Welch, {sizes}")


def over_examples(mean: float, examples: int, sd: float | None = None, *, level: float = 0.95) -> Interval:
    """The test set's own error: where a metric would lie over all examples that the test set was drawn from.

    It is apart from `interval`: all seeds are measured on the same examples, so more seeds do not narrow it. For a mean
    over seeds of an accuracy it is an upper bound, as averaging evens out part of an example's chance.

    Args:
      mean: The metric over the test examples; a share in [0, 1] if `sd` is None.
      examples: How many test examples, independent of each other.
      sd: Standard deviation of the metric over examples. None for an accuracy, whose spread follows from its mean
        (Wilson's interval, which has a width at 0 and 1 as well).
      level: Coverage, e.g. 0.95.

    Raises:
      ValueError: `examples` is below 1, `sd` is negative, without `sd` the mean is not a share, or `level` is not in
        (0, 1).

    Example:
      >>> over_examples(0.8, 1000)
      Interval(mean=0.8, low=0.774..., high=0.823..., method='Wilson, 1,000 examples')
      >>> over_examples(1.0, 50)[1:3]
      (0.928..., 1.0)

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    _check_coverage(level)
    if examples < 1:
        raise ValueError(f"examples is {examples}; a mean needs at least one.")
    z = -float(ndtri((1 - level) / 2))
    if sd is not None:
        if not sd >= 0:
            raise ValueError(f"sd is {sd}; a standard deviation is not negative.")
        half = z * sd / math.sqrt(examples)
        return Interval(mean, mean - half, mean + half, f"normal, {examples:,} examples")
    if not 0 <= mean <= 1:
        raise ValueError(
            f"mean is {mean}; without `sd` it must be a share in [0, 1].\n"
            "  next: give `sd`, the standard deviation of the metric over examples."
        )
    shrink = 1 + z * z / examples
    centre = (mean + z * z / (2 * examples)) / shrink
    half = z / shrink * math.sqrt(mean * (1 - mean) / examples + (z / (2 * examples)) ** 2)
    return Interval(mean, max(0.0, centre - half), min(1.0, centre + half), f"Wilson, {examples:,} examples")


def seeds_to_tell(
    differences: ArrayLike, difference: float, *, power: float = 0.8, level: float = 0.05, comparisons: int = 1
) -> SeedsToTell:
    """How many paired seeds would tell a true `difference`, given the spread of the paired differences seen so far.

    Of n pairs the sign-flip test can reach only multiples of 2^(1-n), so its true level is the largest one below
    `level / comparisons` (the first step of Holm's correction). Its power is near that of Student's t test at that
    level, which the noncentral t distribution gives for normal differences: where 0.8 is asked for, 0.80 to 0.88 is
    reached (simulated up to 15 pairs). `non_inferior` reaches about as much between equal conditions when `difference`
    is its margin.

    The spread of a few pairs is itself uncertain: `low` and `high` are the seeds at the ends of its 95 % interval, and
    after six pairs `high` is five times `seeds`. Give the smallest difference that matters, not the one seen.

    Args:
      differences: (n,), one paired difference per seed; only their standard deviation counts.
      difference: The true difference to be told, in the same units; its sign does not matter.
      power: Chance to find it.
      level: Of the two-sided test.
      comparisons: How many tests share Holm's correction.

    Returns:
      `SeedsToTell(seeds, low, high, sd)`.

    Raises:
      ValueError: Fewer than two differences or identical ones, `difference` zero, `power` or `level` not in (0, 1).

    Example:
      >>> seeds_to_tell([0.4, -0.2, 1.1, 0.3, -0.6, 0.8], 0.5)  # points of accuracy
      SeedsToTell(seeds=15, low=8, high=76, sd=0.62...)

    Source: Johnson & Welch, "Applications of the non-central t-distribution", Biometrika 1940.
    """
    x = sample(differences)
    if not (0 < power < 1 and 0 < level < 1 and comparisons >= 1):
        raise ValueError(f"power {power} and level {level} lie between 0 and 1, comparisons {comparisons} from 1 on.")
    if level / comparisons < 1e-200:
        raise ValueError(f"level / comparisons is {level / comparisons:.0e}; the tails of t are known down to 1e-200.")
    if not (math.isfinite(difference) and difference):
        raise ValueError(f"difference is {difference}; say how large a true difference is to be told.")
    if x.size < 2 or math.isnan(limits(x)[0]):
        raise ValueError(f"{x.size} identical differences show no spread.\n  next: give those of two or more seeds.")
    sd = float(x.std(ddof=1))
    freedom = x.size - 1
    ends = [math.sqrt(freedom / (2 * float(gammaincinv(freedom / 2, share)))) for share in (0.975, 0.025)]  # of chi^2
    seeds, low, high = (_seeds(abs(difference) / (sd * factor), power, level / comparisons) for factor in (1.0, *ends))
    return SeedsToTell(seeds, low, high, sd)


def _seeds(effect: float, power: float, level: float) -> int:
    """The smallest n at which the sign-flip test of n normal pairs has the power; `effect` is mean / sd."""
    least = (float(ndtri(power)) - float(ndtri(level / 2))) / effect  # known spread, no steps: a lower bound
    n = max(2, math.ceil(least**2))
    while _power(effect, n, level) < power:
        n += 1
    return n


def _power(effect: float, n: int, level: float) -> float:
    """P(|T| > quantile), T noncentral with n - 1 degrees of freedom: the normal tail, averaged over the spread seen.

    `scipy.stats.nct` gives nan far from zero.
    """
    steps = 2.0 ** min(n - 1, 1000)
    reached = (math.ceil(level * steps) - 1) / steps  # the largest multiple of 2^(1-n) below the level
    if reached <= 0:
        return 0.0
    sure = (np.arange(1000) + 0.5) / 1000
    chi2 = 2 * gammaincinv((n - 1) / 2, sure)
    spread = -stdtrit(n - 1, reached / 2) * np.sqrt(chi2 / (n - 1))
    shift = effect * math.sqrt(n)
    return float(np.mean(ndtr(shift - spread) + ndtr(-spread - shift)))
