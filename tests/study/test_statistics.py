import itertools
import math

import numpy as np
import pytest

from lorax_kit.study.statistics import (
    compare,
    holm,
    interval,
    paired_test,
    seeds_needed,
    smallest_p,
)


def signflip_by_hand(x, y):
    """Share of all 2^n sign patterns whose |mean| reaches the observed one."""
    d = np.asarray(x, float) - np.asarray(y, float)
    means = [abs(np.mean(d * signs)) for signs in itertools.product([1, -1], repeat=d.size)]
    return np.mean(np.array(means) >= abs(d.mean()) - 1e-12)


def holm_by_definition(p):
    """Adjusted p of hypothesis i: the smallest level at which Holm's procedure rejects it."""
    p = list(p)
    m = len(p)
    order = sorted(range(m), key=p.__getitem__)
    out = [0.0] * m
    for position, i in enumerate(order):
        out[i] = min(1.0, max((m - j) * p[order[j]] for j in range(position + 1)))
    return out


def test_two_to_five_values_give_the_student_interval():
    # t(0.975; 2) = 4.302652729911275, sd = 1
    mean, low, high, method = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert high - 2.0 == pytest.approx(4.302652729911275 / math.sqrt(3), rel=1e-9)
    assert 2.0 - low == pytest.approx(high - 2.0)
    assert method == "Student t, n = 3"
    # Two values: t(0.975; 1) = tan(0.475 pi), the Cauchy quantile.
    assert interval([0.0, 2.0]).high - 1.0 == pytest.approx(math.tan(0.475 * math.pi), rel=1e-9)
    assert interval([1.0, 2.0, 3.0], level=0.9).high - 2.0 == pytest.approx(2.919985580353726 / math.sqrt(3), rel=1e-9)


def bca_by_hand(x, level, resamples, rng):
    """Efron 1987, equations 2.3 and 6.6, with its own generator and a rational normal quantile."""
    from statistics import NormalDist

    normal = NormalDist()
    boot = np.sort(rng.choice(x, size=(resamples, x.size)).mean(axis=1))
    z0 = normal.inv_cdf((np.mean(boot < x.mean()) + np.mean(boot <= x.mean())) / 2)
    jack = np.array([np.delete(x, i).mean() for i in range(x.size)])
    dev = jack.mean() - jack
    acc = (dev**3).sum() / (6 * (dev**2).sum() ** 1.5)
    limits = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = z0 + normal.inv_cdf(tail)
        limits.append(np.quantile(boot, normal.cdf(z0 + z / (1 - acc * z))))
    return limits


def test_six_values_or_more_give_the_bca_bootstrap():
    x = np.array([0.80, 0.81, 0.83, 0.84, 0.86, 0.93])
    result = interval(x)
    low, high = bca_by_hand(x, 0.95, 200_000, np.random.default_rng(1))
    assert result.method == "BCa bootstrap"
    assert result.low == pytest.approx(low, abs=1.5e-3)
    assert result.high == pytest.approx(high, abs=1.5e-3)
    # The sample is skewed to the right, so is the interval.
    assert result.high - result.mean > result.mean - result.low


def test_interval_is_the_same_at_every_call():
    x = np.random.default_rng(3).normal(size=8)
    assert interval(x) == interval(x)


def test_one_value_has_no_interval():
    mean, low, high, method = interval([0.7])
    assert (mean, method) == (0.7, "one value, no interval")
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.parametrize("n", [2, 6, 9])
def test_identical_values_are_reported_as_such(n):
    assert interval([0.5] * n) == (0.5, 0.5, 0.5, f"{n} identical values")


@pytest.mark.parametrize(
    ("values", "message"),
    [([], "non-empty vector"), ([[1.0]], "non-empty vector"), ([1.0, math.nan], "1 of 2 values are not")],
)
def test_interval_rejects(values, message):
    with pytest.raises(ValueError, match=message):
        interval(values)


@pytest.mark.parametrize("n", [2, 3, 5, 6, 8, 10])
def test_paired_test_equals_enumeration(n):
    rng = np.random.default_rng(n)
    x, y = rng.normal(0.5, 1, n), rng.normal(0, 1, n)
    assert paired_test(x, y) == pytest.approx(signflip_by_hand(x, y), abs=1e-12)


def test_paired_test_with_ties_equals_enumeration():
    x, y = [3, 1, 2, 2, 5, 4, 4], [1, 1, 1, 2, 6, 3, 3]
    assert paired_test(x, y) == pytest.approx(signflip_by_hand(x, y), abs=1e-12)


def test_p_below_5_percent_needs_six_pairs():
    for n in range(1, 9):
        p = paired_test(np.arange(1, n + 1), np.zeros(n))
        assert p == smallest_p(n) == 2.0 ** (1 - n)
        assert (p < 0.05) == (n >= 6)


def test_equal_samples_have_p_one():
    assert paired_test([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0


def test_many_pairs_are_sampled_and_near_the_normal_limit():
    rng = np.random.default_rng(0)
    d = rng.normal(0.35, 1, 40)
    z = d.sum() / math.sqrt((d**2).sum())  # sign flips: mean 0, variance sum d^2
    assert paired_test(d, np.zeros(40)) == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.01)


def test_paired_test_rejects_unequal_lengths():
    with pytest.raises(ValueError, match="equal lengths, got 3 and 2"):
        paired_test([1, 2, 3], [1, 2])


@pytest.mark.parametrize(
    "p", [[0.01, 0.04, 0.03], [0.5, 0.6, 0.01, 0.01], [0.2], [1.0, 1.0], [0.001, 0.2, 0.04, 0.04, 0.9]]
)
def test_holm_equals_its_definition(p):
    np.testing.assert_allclose(holm(p), holm_by_definition(p), rtol=1e-12)


def test_holm_leaves_out_nan():
    np.testing.assert_allclose(holm([0.01, math.nan, 0.04]), [0.02, math.nan, 0.04])
    assert holm([]).shape == (0,)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([1.2])


def test_seeds_needed_grows_with_the_number_of_comparisons():
    assert [seeds_needed(m) for m in (1, 2, 4, 5)] == [6, 7, 8, 8]


def rows_of(table, **extra):
    return [
        {"rank": rank, "seed": seed, "acc": value, "status": "done", **extra}
        for rank, values in table.items()
        for seed, value in enumerate(values)
    ]


def test_compare_pairs_by_seed_against_the_best():
    table = {
        1: [0.70, 0.72, 0.74, 0.71, 0.73, 0.75],
        2: [0.80, 0.79, 0.82, 0.81, 0.83, 0.80],
        4: [0.81, 0.80, 0.81, 0.82, 0.84, 0.82],
    }
    rows = rows_of(table)
    np.random.default_rng(0).shuffle(rows)  # the order of the rows must not matter to the pairing
    result = {c.condition[0]: c for c in compare(rows, "acc", ("rank",), better="higher")}
    assert set(result) == {1, 2}
    assert {c.against for c in result.values()} == {(4,)}
    for rank, c in result.items():
        d = np.array(table[rank]) - np.array(table[4])
        assert (c.pairs, c.unpaired) == (6, 0)
        assert c.difference == pytest.approx(d.mean())
        assert c.p == pytest.approx(signflip_by_hand(table[rank], table[4]))
        assert (c.low, c.high) == pytest.approx(interval(d)[1:3])
    np.testing.assert_allclose([result[r].p_holm for r in (1, 2)], holm_by_definition([result[r].p for r in (1, 2)]))


def test_compare_drops_failed_and_missing_trials_and_counts_them():
    rows = rows_of({1: [0.1, 0.2, 0.3, 0.4], 2: [0.2, 0.3, 0.5, 0.9]})
    rows[1] |= {"status": "diverged", "acc": math.nan}
    rows[2]["acc"] = None
    del rows[7]  # rank 2, seed 3
    (c,) = compare(rows, "acc", ("rank",), against=(2,))
    assert (c.pairs, c.unpaired) == (1, 3)
    assert c.difference == pytest.approx(-0.1)
    assert math.isnan(c.low)
    assert c.p == 1.0


def test_compare_without_pairs_gives_nan_not_an_error():
    rows = rows_of({1: [0.5], 2: [0.6]})
    rows[1]["seed"] = 7
    (c,) = compare(rows, "acc", ("rank",), better="higher")
    assert (c.pairs, c.unpaired, c.method) == (0, 2, "no pairs")
    assert math.isnan(c.p_holm)
    assert compare([r | {"status": "diverged"} for r in rows], "acc", ("rank",), better="higher") == []


def test_compare_chooses_the_lowest_loss_when_told():
    rows = rows_of({1: [0.5, 0.6], 2: [0.2, 0.3]})
    (c,) = compare(rows, "acc", ("rank",), better="lower")
    assert c.against == (2,)


def test_a_condition_with_lost_seeds_is_not_the_reference():
    rows = rows_of({1: [0.5, 0.6], 2: [0.9, 0.9]})
    rows[3]["status"] = "diverged"
    (c,) = compare(rows, "acc", ("rank",), better="higher")
    assert c.against == (1,)


def test_compare_rejects():
    rows = rows_of({1: [0.5, 0.6]})
    with pytest.raises(ValueError, match="two trials with seed 0"):
        compare(rows + rows[:1], "acc", ("rank",), better="higher")
    with pytest.raises(ValueError, match=r"no trial of condition \(3,\)"):
        compare(rows, "acc", ("rank",), against=(3,))
    with pytest.raises(ValueError, match="better is None; it must be 'higher' or 'lower'"):
        compare(rows, "acc", ("rank",))
