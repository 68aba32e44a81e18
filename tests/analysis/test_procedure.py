"""The whole procedure, simulated: rates chosen by validation, ranks compared on test data, claims counted.

A trial's value is quality + noise of its own on validation and on test data; `share` is the quality's part of the
variance, which both have in common. No rank and no rate is truly better than another.
"""

import numpy as np
import pytest

from lorax_kit.analysis.statistics.conditions import compare, limits, non_inferior, sign_flips

RANKS, RATES = (1, 2, 4, 8), 3
STUDIES = 4000


def error_of(share):
    """Standard error of a share among the studies."""
    return np.sqrt(share * (1 - share) / STUDIES)


def measured(rng, studies, seeds, share, rates=RATES):
    """Validation and test values, (studies, seeds, ranks, rates) each, with mean 0 and variance 1."""
    shape = (studies, seeds, len(RANKS), rates)
    quality = np.sqrt(share) * rng.normal(size=shape)
    val, test = (quality + np.sqrt(1 - share) * rng.normal(size=shape) for _ in range(2))
    return val, test


def chosen(val, test):
    """Test values (studies, seeds, ranks) at each rank's rate of the best mean validation, and the best rank by it."""
    means = val.mean(axis=1)
    rate = means.argmax(axis=-1)
    return np.take_along_axis(test, rate[:, None, :, None], -1)[..., 0], means.max(axis=-1).argmax(axis=-1)


def of_rank(test, rank):
    return np.take_along_axis(test, rank[:, None, None], -1)[..., 0]


def coverage(values):
    low, high = limits(values)
    return np.mean((low <= 0) & (high >= 0))


def rows_of(test):
    """One study (seeds, ranks) as rows."""
    return [
        {"rank": rank, "seed": seed, "acc": value}
        for seed, values in enumerate(test.tolist())
        for rank, value in zip(RANKS, values, strict=True)
    ]


@pytest.mark.parametrize("reference", ["fixed", "best on validation"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_no_true_difference_is_claimed_in_5_percent_of_studies_at_most(share, reference):
    test, best = chosen(*measured(np.random.default_rng(0), STUDIES, 8, share))
    best = best if reference != "fixed" else np.full_like(best, len(RANKS) - 1)
    claims = [
        min(c.p_holm for c in compare(rows_of(one), "acc", ("rank",), against=(RANKS[k],))) < 0.05
        for one, k in zip(test, best, strict=True)
    ]
    assert np.mean(claims) <= 0.05 + 2 * error_of(0.05)
    assert share > 0 or np.mean(claims) >= 0.03  # nor is the test so careful that it finds nothing


def test_a_reference_chosen_by_the_compared_numbers_is_paid_for():
    test = np.random.default_rng(1).normal(size=(STUDIES, 8, len(RANKS)))
    best = test.mean(axis=1).argmax(axis=-1)
    uncorrected, claims = [], []
    for one, k in zip(test, best, strict=True):
        found = compare(rows_of(one), "acc", ("rank",), better="higher")
        assert {c.against for c in found} == {(RANKS[k],)}
        claims.append(min(c.p_holm for c in found) < 0.05)
        uncorrected.append(3 * min(c.p for c in found) < 0.05)
    assert np.mean(claims) <= 0.05 + 2 * error_of(0.05)
    assert np.mean(uncorrected) > 0.06  # what Holm over the three comparisons alone would give


@pytest.mark.parametrize("seeds", [3, 6, 10, 20])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_interval_of_a_ranks_chosen_rate_covers_93_to_97_percent(share, seeds):
    test, _ = chosen(*measured(np.random.default_rng(2), 10_000, seeds, share))
    assert 0.93 <= coverage(test[..., 0]) <= 0.97


def test_the_interval_of_the_best_of_all_holds_if_validation_has_its_own_noise():
    rng = np.random.default_rng(3)
    covered = {}
    for share in (0.0, 0.5, 1.0):
        test, best = chosen(*measured(rng, 10_000, 6, share))
        covered[share] = coverage(of_rank(test, best))
    assert 0.93 <= covered[0.0] <= 0.97
    # What the seeds have in common flatters the best of twelve, on test data as on validation.
    assert covered[0.5] == pytest.approx(0.92, abs=0.015)
    assert covered[1.0] == pytest.approx(0.82, abs=0.015)


def test_fresh_seeds_of_the_best_hold_whatever_is_in_common():
    rng = np.random.default_rng(4)
    val, _ = measured(rng, 10_000, 6, 1.0)
    _, test = measured(rng, 10_000, 6, 1.0)
    test, best = chosen(val, test)
    assert 0.93 <= coverage(of_rank(test, best)) <= 0.97


def test_unequal_numbers_of_rates_make_false_claims():
    """Why every rank must try as many rates: six against one, with everything in common."""
    val, test = measured(np.random.default_rng(5), 4000, 8, 1.0, rates=6)
    many, _ = chosen(val, test)
    false = np.mean(sign_flips(many[..., 0] - test[..., 1, 0]) < 0.05)
    assert false == pytest.approx(0.09, abs=0.015)
    assert np.mean(sign_flips(many[..., 0] - many[..., 1]) < 0.05) <= 0.05


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_rank_at_the_margin_is_claimed_in_2_5_percent_of_studies_at_most(share):
    """All smaller ranks are worse by exactly the margin, so every claim is false; their rates are chosen as ever."""
    val, test = measured(np.random.default_rng(6), STUDIES, 6, share)
    for values in (val, test):
        values[:, :, :-1] -= 0.5
    test, _ = chosen(val, test)
    options = {"margin": 0.5, "better": "higher"}
    claims = [non_inferior(rows_of(one), "acc", ("rank",), (8,), **options).smallest != (8,) for one in test]
    assert np.mean(claims) <= 0.025 + 2 * error_of(0.025)


def test_the_sequence_keeps_the_level_at_a_later_rung():
    """Rank 4 is as good as the reference and is claimed; rank 2 lies at the margin, rank 1 below it."""
    test = np.random.default_rng(7).normal(size=(STUDIES, 6, len(RANKS))) * 0.1
    test += np.array([-0.8, -0.5, 0.0, 0.0])
    options = {"margin": 0.5, "better": "higher"}
    smallest = [non_inferior(rows_of(one), "acc", ("rank",), (8,), **options).smallest[0] for one in test]
    assert np.mean(np.array(smallest) <= 2) <= 0.025 + 2 * error_of(0.025)
    assert np.mean(np.array(smallest) == 4) >= 0.95


@pytest.mark.parametrize("kind", ["normal", "discrete", "skewed alike"])
def test_one_sided_bounds_miss_in_2_5_percent_at_most(kind):
    rng = np.random.default_rng(8)
    draw = {
        "normal": lambda shape: rng.normal(size=shape),
        "discrete": lambda shape: rng.binomial(60, 0.9, shape) / 60,
        "skewed alike": lambda shape: rng.gamma(4, size=shape),
    }[kind]
    for n in (3, 4, 6, 10, 20):
        low, _ = limits(draw((20_000, n)) - draw((20_000, n)))
        assert np.mean(low > 1e-12) <= 0.025 + 0.002
