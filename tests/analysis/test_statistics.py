import itertools
import math

import numpy as np
import pytest

from lorax_kit.analysis.statistics.conditions import (
    compare,
    holm,
    interval,
    non_inferior,
    paired_test,
    seeds_needed,
    sign_flips,
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


def test_interval_is_the_same_at_every_call():
    x = np.random.default_rng(3).normal(size=8)
    assert interval(x) == interval(x)


def test_one_value_has_no_interval():
    mean, low, high, method = interval([0.7])
    assert (mean, method) == (0.7, "one value, no interval")
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.parametrize("n", [2, 6, 9])
def test_identical_values_have_no_interval(n):
    mean, low, high, method = interval([0.5] * n)
    assert (mean, method) == (0.5, f"{n} identical values, no spread seen, no interval")
    assert math.isnan(low)
    assert math.isnan(high)


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


def test_sign_flips_of_many_samples_are_those_of_each():
    d = np.random.default_rng(1).normal(size=(2, 3, 9))
    wanted = [[signflip_by_hand(x, np.zeros(9)) for x in rows] for rows in d]
    np.testing.assert_allclose(sign_flips(d), wanted, rtol=1e-12)


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
    # The reference was chosen from these numbers: the correction is over all three pairs.
    p = [result[1].p, result[2].p, signflip_by_hand(table[1], table[2])]
    np.testing.assert_allclose([result[r].p_holm for r in (1, 2)], holm_by_definition(p)[:2])
    named = compare(rows, "acc", ("rank",), against=(4,))
    corrected = dict(zip((1, 2), holm_by_definition(p[:2]), strict=True))
    assert {c.condition[0]: c.p_holm for c in named} == pytest.approx(corrected)


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


LADDER = {
    1: [0.70, 0.72, 0.69, 0.71, 0.70],
    2: [0.80, 0.82, 0.80, 0.79, 0.82],
    4: [0.79, 0.82, 0.81, 0.80, 0.81],
    8: [0.81, 0.82, 0.81, 0.80, 0.83],
}


def test_the_smallest_rank_not_inferior_is_the_last_one_before_the_first_that_fails():
    rows = rows_of(LADDER)
    found = non_inferior(rows, "acc", ("rank",), (8,), margin=0.03, better="higher")
    assert [r.condition for r in found.rungs] == [(4,), (2,), (1,)]
    assert [r.holds for r in found.rungs] == [True, True, False]
    assert (found.smallest, found.margin) == ((2,), 0.03)
    for rung in found.rungs:
        d = np.array(LADDER[rung.condition[0]]) - np.array(LADDER[8])
        assert (rung.difference, rung.bound) == pytest.approx(interval(d)[:2])
        assert (rung.pairs, rung.unpaired, rung.against) == (5, 0, (8,))
    # Rank 4 fails at a margin that rank 2 would keep, and ends the ladder.
    strict = non_inferior(rows, "acc", ("rank",), (8,), margin=0.02, better="higher")
    assert strict.rungs[1].bound > -0.02 > strict.rungs[0].bound
    assert strict.smallest == (8,)
    assert not any(r.holds for r in strict.rungs)


def test_a_loss_is_not_inferior_by_its_upper_limit():
    losses = {rank: [1 - value for value in values] for rank, values in LADDER.items()}
    found = non_inferior(rows_of(losses), "acc", ("rank",), (8,), margin=0.03, better="lower")
    mirrored = non_inferior(rows_of(LADDER), "acc", ("rank",), (8,), margin=0.03, better="higher")
    assert found.smallest == mirrored.smallest == (2,)
    assert [r.bound for r in found.rungs] == pytest.approx([-r.bound for r in mirrored.rungs])


def test_a_rung_without_an_interval_ends_the_ladder():
    rows = rows_of(LADDER | {4: [value - 0.001 for value in LADDER[8]]})
    found = non_inferior(rows, "acc", ("rank",), (8,), margin=0.03, better="higher")
    assert found.rungs[0].method == "5 identical values, no spread seen, no interval"
    assert found.smallest == (8,)
    given = non_inferior(rows, "acc", ("rank",), (8,), margin=0.03, better="higher", ladder=[(2,), (1,)])
    assert given.smallest == (2,)


def test_non_inferior_counts_failed_trials():
    rows = rows_of(LADDER)
    rows[10]["status"] = "diverged"  # rank 4, seed 0
    found = non_inferior(rows, "acc", ("rank",), (8,), margin=0.05, better="higher")
    assert (found.rungs[0].pairs, found.rungs[0].unpaired) == (4, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": 0.0}, "margin is 0.0; it must be above zero"),
        ({"margin": math.nan}, "margin is nan"),
        ({"better": "up"}, "better is 'up'; it must be 'higher' or 'lower', which says which limit"),
        ({"against": (3,)}, r"no trial of condition \(3,\)"),
        ({"ladder": [(4,), (5,)]}, r"no trial of condition \(5,\)"),
        ({"by": ("rank", "status"), "against": (8, "done")}, "have no order of their own"),
    ],
)
def test_non_inferior_rejects(change, message):
    options = {"by": ("rank",), "against": (8,), "margin": 0.03, "better": "higher"} | change
    with pytest.raises(ValueError, match=message):
        non_inferior(rows_of(LADDER), "acc", **options)
