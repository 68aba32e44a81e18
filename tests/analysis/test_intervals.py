"""Intervals hold the true mean as often as they say, and the power note finds what it promises (simulated)."""

import math

import numpy as np
import pytest

from lorax_kit.analysis.statistics.conditions import (
    interval,
    limits,
    over_examples,
    seeds_to_tell,
    sign_flips,
    unpaired,
)

SAMPLES = 20_000
ERROR = 0.004  # two standard errors of a share of 0.93 among them
KINDS = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "gamma": (lambda rng, shape: rng.gamma(4, size=shape), 4.0),
    "lognormal": (lambda rng, shape: rng.lognormal(0, 0.5, shape), math.exp(0.125)),
    "losses": (lambda rng, shape: -rng.lognormal(0, 0.5, shape), -math.exp(0.125)),
    "accuracy of 1,000": (lambda rng, shape: rng.binomial(1000, 0.8, shape) / 1000, 0.8),
    "accuracy of 60": (lambda rng, shape: rng.binomial(60, 0.9, shape) / 60, 0.9),
    "differences of 60": (lambda rng, shape: (rng.binomial(60, 0.9, shape) - rng.binomial(60, 0.9, shape)) / 60, 0.0),
}


def hall_by_bisection(x, error):
    """Solve g(T) = ±q for the mean, with the cubic as printed: x + a x^2 / 3 + a^2 x^3 / 27 + a / 6."""
    from scipy.optimize import brentq
    from scipy.stats import t

    n, s = len(x), np.std(x, ddof=1)
    a = 0.5 * np.mean((x - np.mean(x)) ** 3) / np.std(x) ** 3 / math.sqrt(n)

    def g(mean):
        big_t = math.sqrt(n) * (np.mean(x) - mean) / s
        return big_t + a * big_t**2 / 3 + a**2 * big_t**3 / 27 + a / 6

    q = t.ppf(1 - error / 2, n - 1)
    ends = np.mean(x) - 1000 * s, np.mean(x) + 1000 * s
    return [brentq(lambda mean, u=u: g(mean) - u, *ends, xtol=1e-13) for u in (q, -q)]


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_limits_invert_halls_cubic(level):
    for n in (3, 6, 15):
        x = np.random.default_rng(n).gamma(1.0, size=n)
        assert interval(x, level)[1:3] == pytest.approx(hall_by_bisection(x, 0.85 * (1 - level)), rel=1e-8)


def test_limits_of_a_symmetric_sample_are_students():
    # t(1 - 0.02125; 2): the distribution function of two degrees of freedom is 1/2 + t / (2 sqrt(2 + t^2)).
    u = 1 - 2 * 0.02125
    quantile = u * math.sqrt(2 / (1 - u * u))
    mean, low, high, method = interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - quantile / math.sqrt(3), 2 + quantile / math.sqrt(3)), rel=1e-9)
    assert (mean, method) == (2.0, "t corrected for skewness, n = 3")


@pytest.mark.parametrize("kind", KINDS)
def test_95_percent_intervals_cover_93_to_97_at_every_n(kind):
    draw, mean = KINDS[kind]
    rng = np.random.default_rng(1)
    for n in range(3, 21):
        low, high = limits(draw(rng, (SAMPLES, n)))
        seen = ~np.isnan(low)
        covered = np.mean((low[seen] <= mean + 1e-12) & (mean - 1e-12 <= high[seen]))
        assert 0.93 - ERROR <= covered <= 0.97 + ERROR, f"n = {n}: {covered}"


def test_limits_of_many_samples_are_those_of_each():
    x = np.random.default_rng(2).normal(size=(2, 3, 7))
    low, high = limits(x)
    assert low.shape == (2, 3)
    assert (low[1, 2], high[1, 2]) == interval(x[1, 2])[1:3]


def test_limits_move_and_scale_with_the_values():
    x = np.random.default_rng(3).gamma(2.0, size=6)
    _, low, high, _ = interval(x)
    assert interval(5 + 1e-6 * x)[1:3] == pytest.approx((5 + 1e-6 * low, 5 + 1e-6 * high), rel=1e-12)
    assert interval(-x)[1:3] == pytest.approx((-high, -low), rel=1e-12)


def test_identical_accuracies_are_no_evidence_of_no_spread():
    """Three equal accuracies of 20 examples: the true mean is elsewhere most of the time, so no limits are given."""
    x = np.random.default_rng(4).binomial(20, 0.9, (SAMPLES, 3)) / 20
    same = np.ptp(x, axis=1) == 0
    assert np.mean(same) > 0.03
    assert np.mean(np.abs(x[same, 0] - 0.9) > 0.01) > 0.5
    assert np.array_equal(np.isnan(limits(x)[0]), same)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_a_level_is_between_0_and_1(level):
    with pytest.raises(ValueError, match=f"level is {level}; a coverage lies between 0 and 1"):
        interval([1.0, 2.0], level)


@pytest.mark.parametrize(("share", "examples"), [(0.6, 200), (0.9, 200), (0.9, 1000)])
def test_the_test_sets_own_error_is_covered(share, examples):
    right = np.random.default_rng(5).binomial(examples, share, SAMPLES)
    counts, times = np.unique(right, return_counts=True)
    inside = [low <= share <= high for _, low, high, _ in (over_examples(k / examples, examples) for k in counts)]
    assert np.average(inside, weights=times) == pytest.approx(0.95, abs=0.015)


def test_the_test_sets_own_error_in_numbers():
    # Wilson: roots of (p - x)^2 = z^2 x (1 - x) / N.
    _, low, high, method = over_examples(0.8, 400)
    z = 1.959963984540054
    assert sorted(np.roots([1 + z * z / 400, -(1.6 + z * z / 400), 0.64])) == pytest.approx([low, high], rel=1e-12)
    assert method == "Wilson, 400 examples"
    assert over_examples(2.5, 100, sd=1.0)[1:3] == pytest.approx((2.5 - z / 10, 2.5 + z / 10))
    assert over_examples(1.0, 100).low < 0.97  # an accuracy of 100 % has an error, too


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1.7, 10), "must be a share"), ((0.5, 0), "examples is 0"), ((0.5, 10, -1.0), "sd is -1.0")],
)
def test_the_test_sets_own_error_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        over_examples(*arguments)


def spread_of(sd):
    return np.array([-1.0, 1.0, -1.0, 1.0]) * sd * math.sqrt(3) / 2


@pytest.mark.parametrize(("effect", "comparisons"), [(1.5, 1), (1.2, 1), (1.0, 1), (1.6, 4)])
def test_as_many_seeds_as_the_power_note_says_find_the_difference(effect, comparisons):
    note = seeds_to_tell(spread_of(2.0), 2.0 * effect, comparisons=comparisons)
    assert note.sd == pytest.approx(2.0)
    rng = np.random.default_rng(6)

    def found(pairs):
        p = sign_flips(rng.normal(2.0 * effect, 2.0, (3000, pairs)))
        return np.mean(comparisons * p < 0.05)

    assert 0.78 <= found(note.seeds) <= 0.90
    assert found(note.seeds - 1) < 0.81
    bound, _ = limits(rng.normal(0.0, 2.0, (SAMPLES, note.seeds)))  # equal conditions, the difference as a margin
    assert np.mean(bound > -2.0 * effect) >= 0.75


def test_the_power_note_holds_the_true_number_at_its_ends():
    rng, true = np.random.default_rng(7), seeds_to_tell(spread_of(1.0), 1.0).seeds
    notes = [seeds_to_tell(rng.normal(size=6), 1.0) for _ in range(300)]
    assert np.mean([low <= true <= high for _, low, high, _ in notes]) >= 0.93


@pytest.mark.parametrize(("effect", "n"), [(0.4, 52), (0.5, 35), (0.65, 22)])
def test_the_power_is_that_of_the_noncentral_t(effect, n):
    """Of many pairs, where the test's true level is `level` itself."""
    from scipy.stats import nct, t

    quantile = t.isf(0.025, n - 1)
    wanted = [1 - nct.cdf(quantile, k - 1, effect * math.sqrt(k)) for k in (n - 1, n)]
    needed = [
        seeds_to_tell(spread_of(1.0), effect, power=float(p)).seeds for p in (wanted[0] + 0.002, wanted[1] - 0.002)
    ]
    assert needed == [n, n]


def test_the_power_note_ends_at_the_sign_flip_tests_own_least():
    assert [seeds_to_tell(spread_of(1.0), 1e9, comparisons=m).seeds for m in (1, 5)] == [6, 8]
    assert seeds_to_tell(spread_of(1.0), 0.05).seeds == pytest.approx(((1.96 + 0.8416) / 0.05) ** 2, rel=2e-3)


@pytest.mark.parametrize(
    ("values", "difference", "options", "message"),
    [
        ([0.1], 1.0, {}, "1 identical differences show no spread"),
        ([0.1, 0.1], 1.0, {}, "2 identical differences show no spread"),
        ([0.1, 0.2], 0.0, {}, "difference is 0.0; say how large"),
        ([0.1, 0.2], 1.0, {"power": 1.0}, "power 1.0"),
    ],
)
def test_the_power_note_rejects(values, difference, options, message):
    with pytest.raises(ValueError, match=message):
        seeds_to_tell(values, difference, **options)


def test_the_unpaired_interval_is_that_of_scipy():
    from scipy.stats import ttest_ind

    x, y = np.random.default_rng(0).normal((0.0, 0.5), (1.0, 3.0), (7, 2)).T
    found = unpaired(x, y[:4])
    wanted = ttest_ind(x, y[:4], equal_var=False).confidence_interval(0.95)
    assert found[:3] == pytest.approx((x.mean() - y[:4].mean(), wanted.low, wanted.high))
    assert found.method == "Welch, n = 7 and 4"


@pytest.mark.parametrize("sizes", [(3, 3), (3, 6), (6, 12)])
def test_the_unpaired_interval_covers(sizes):
    draw, hits = np.random.default_rng(1), 0
    for _ in range(4000):
        x, y = draw.normal(0, 1, sizes[0]), draw.normal(0.3, 2, sizes[1])
        found = unpaired(x, y)
        hits += found.low <= -0.3 <= found.high
    assert 0.935 <= hits / 4000 <= 0.975


def test_the_unpaired_interval_says_what_it_cannot_tell():
    assert unpaired([1.0], [2.0, 3.0])[3] == "one value, no interval, n = 1 and 2"
    assert unpaired([1.0, 1.0], [2.0, 2.0])[3] == "no spread seen, no interval, n = 2 and 2"
    with pytest.raises(ValueError, match="not finite"):
        unpaired([1.0, np.nan], [2.0, 2.0])


def test_intervals_know_no_units():
    """Values of another magnitude have the same interval in it; what is only rounding is no spread."""
    plain, other = interval([1.0, 2.0, 4.0]), unpaired([1.0, 2.0, 4.0], [1.0, 7.0])
    for unit in (2.0**700, 2.0**-700):
        assert [x / unit for x in interval([unit, 2 * unit, 4 * unit])[:3]] == pytest.approx(plain[:3])
        found = unpaired([unit, 2 * unit, 4 * unit], [unit, 7 * unit])
        assert [x / unit for x in found[:3]] == pytest.approx(other[:3])
        assert found.method == other.method
    assert "no spread seen" in unpaired([1e8 + 0.1] * 3, [1e8 + 0.1] * 3).method


@pytest.mark.parametrize("level", [-1, 0, 1, 95, np.nan])
def test_every_interval_checks_its_coverage(level):
    for of in (lambda: interval([1.0, 2.0], level), lambda: unpaired([1.0, 2.0], [1.0, 2.0], level)):
        with pytest.raises(ValueError, match="a coverage lies between 0 and 1"):
            of()
    with pytest.raises(ValueError, match="a coverage lies between 0 and 1"):
        over_examples(0.8, 10, level=level)


def test_the_power_note_takes_any_number_of_comparisons():
    """Below 2^-50, the least p of 51 pairs, more pairs reach the level."""
    found = seeds_to_tell(spread_of(1.0), 1e9, comparisons=10**16)
    assert found.seeds == 59  # 2^-58 < 0.05 / 10^16 < 2^-57
    with pytest.raises(ValueError, match="known down to 1e-200"):
        seeds_to_tell(spread_of(1.0), 1.0, level=1e-300)
