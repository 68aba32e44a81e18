"""The answer says what the seeds can show and no more."""

import pytest

from lorax_kit.report import read_run
from lorax_kit.report.answer import answer, cautions
from lorax_kit.report.conditions import summarise
from tests.report import fake_run


def sentences(folder, scores, **study):
    found = summarise(read_run(fake_run.from_scores(folder, scores, **study)))
    return "\n".join(answer(found)), "\n".join(cautions(found))


def rising(seeds, *means, rate=1e-3, wobble=0.0):
    """Ranks 1, 2, 4, ... whose accuracies rise with the rank; `wobble` alternates in sign for the last one."""
    last = len(means) - 1
    return {
        (2**k, rate): [(mean, mean + 0.001 * s + wobble * (-1) ** s * (k == last)) for s in range(seeds)]
        for k, mean in enumerate(means)
    }


def test_below_six_seeds_it_cannot_tell_however_large_the_difference(tmp_path):
    text, _ = sentences(tmp_path, rising(5, 0.60, 0.90))
    assert "Rank 2 (learning rate 0.001) has the best mean validation accuracy. Its test accuracy is 90.2 %" in text
    assert "Is it distinguishable from rank 1, the next smaller one? This run cannot tell" in text
    assert "mean paired difference +30.00 points" in text
    assert "p = 0.062, 5 seeds" in text
    assert "Fewer than 6 seeds cannot reach p < 0.05 (the smallest p that 5 pairs can give is 0.0625)" in text
    assert "Yes" not in text


def test_six_seeds_and_a_clear_difference_say_yes(tmp_path):
    text, caution = sentences(tmp_path, rising(6, 0.60, 0.90))
    assert "the next smaller one? Yes, it is better: mean paired difference +30.00 points" in text
    assert "sign-flip test of this pair alone p = 0.031, 6 seeds." in text  # 2 of 64 sign patterns
    assert "cannot tell" not in text
    assert "Partial" not in caution


def test_eleven_seeds_put_p_below_a_thousandth(tmp_path):
    text, _ = sentences(tmp_path, rising(11, 0.60, 0.90))
    assert "p < 0.001, 11 seeds" in text  # 2 / 2048
    assert "= <" not in text


def test_a_difference_within_the_noise_says_no_and_that_this_is_not_equality(tmp_path):
    text, _ = sentences(tmp_path, rising(6, 0.80, 0.801, wobble=0.02))
    assert "the next smaller one? No: mean paired difference +0.10 points" in text
    assert "That does not show the two to be equal" in text


def test_a_choice_that_is_worse_on_test_data_is_called_worse(tmp_path):
    scores = {(1, 1e-3): [(0.7, 0.9 + 0.002 * s) for s in range(6)], (2, 1e-3): [(0.8, 0.8)] * 6}
    text, _ = sentences(tmp_path, scores)
    assert "Yes, it is worse on test data: mean paired difference −10.50 points" in text
    assert "(Rank 1 has a higher mean on test data, 90.5 %; the choice is made on validation data" in text


def test_three_ranks_name_the_smallest_that_cannot_be_told_from_the_best(tmp_path):
    text, _ = sentences(tmp_path, rising(8, 0.60, 0.799, 0.80, wobble=0.02))
    assert "The smallest rank not distinguishable from rank 4 is 2: the difference is +0.10 points" in text
    assert "after Holm's correction over 2 comparisons." in text
    text, _ = sentences(tmp_path / "clear", rising(8, 0.60, 0.70, 0.80))
    assert "Every smaller rank is distinguishable from rank 4 after Holm's correction over 2 comparisons." in text


def test_too_few_seeds_for_holm_are_said_to_be_so(tmp_path):
    text, _ = sentences(tmp_path, rising(6, 0.60, 0.70, 0.80))
    assert "with 2 comparisons and Holm's correction no p-value can fall below 0.05 before 7 seeds (here 6)" in text
    assert "distinguishable from rank 4" not in text


def test_a_rank_with_too_few_finished_seeds_is_not_called_distinguishable(tmp_path):
    scores = rising(8, 0.60, 0.70, 0.80)
    scores[1, 1e-3][2:] = [None] * 6
    text, _ = sentences(tmp_path / "few", scores)
    assert "Every other smaller rank is distinguishable" in text
    assert "(Rank 1: too few seeds finished to tell.)" in text
    scores[1, 1e-3][:2], scores[4, 1e-3][:2] = [(0.6, 0.6)] * 2, [None, None]
    scores[2, 1e-3][:2] = [None, None]
    text, _ = sentences(tmp_path / "none shared", scores)
    assert "Every smaller rank" not in text


def test_conditions_with_fewer_seeds_are_named_as_not_considered(tmp_path):
    scores = {(1, 1e-3): [(0.7, 0.7)] * 3, (4, 1e-3): [(0.9, 0.9), None, None]}
    text, _ = sentences(tmp_path, scores)
    assert "Rank 1 (learning rate 0.001) has the best mean validation accuracy among the conditions with 3" in text
    assert "Not considered, having fewer finished seeds: rank 4 with 1." in text
    assert "higher mean on test data" not in text


def test_the_smallest_rank_as_best_advises_smaller_ones_if_there_are_any(tmp_path):
    text, _ = sentences(tmp_path / "a", {(1, 1e-3): [(0.9, 0.9)] * 2, (2, 1e-3): [(0.8, 0.8)] * 2})
    assert "Rank 1 is also the smallest rank that finished." in text
    text, _ = sentences(tmp_path / "b", {(4, 1e-3): [(0.9, 0.9)] * 2, (8, 1e-3): [(0.8, 0.8)] * 2})
    assert "Rank 4 is also the smallest rank that finished; try smaller ones." in text
    assert "Every smaller rank" not in text


def test_a_single_seed_has_no_interval_and_one_rank_no_comparison(tmp_path):
    text, _ = sentences(tmp_path, {(4, 1e-3): [(0.9, 0.875)]})
    assert text.startswith(
        "Rank 4 (learning rate 0.001): the test accuracy is 87.5 % from a single seed, so without an interval. "
        "It trains 49,922 parameters (198 KiB on disk)."
    )
    assert "Only one rank finished, so nothing can be said about the choice of rank." in text


def test_the_same_accuracy_at_every_seed_has_no_interval(tmp_path):
    scores = {(1, 1e-3): [(0.8, 0.875)] * 6, (4, 1e-3): [(0.9, 0.875)] * 6}
    text, _ = sentences(tmp_path, scores)
    assert "Its test accuracy is 87.5 % at all 6 seeds; no spread was seen, so there is no interval." in text
    assert "the difference was the same at every seed, so there is no interval of what may remain." in text


def test_all_diverged_recommends_nothing(tmp_path):
    text, caution = sentences(tmp_path, {(1, 1.0): [None] * 2, (4, 1.0): [None] * 2})
    assert text == (
        "No rank can be recommended: all 4 trials diverged. "
        "A learning rate well below those tried is the first thing to change."
    )
    assert caution.startswith("Diverged: all 4 trials.")


def test_only_the_probe_compares_no_rank(tmp_path):
    text, _ = sentences(tmp_path, {(0, 1e-2): [(0.7, 0.7)] * 2})
    assert (
        text == "This run holds only the probe (a trained head on the frozen base) so far; no rank can be compared yet."
    )


def test_the_gain_over_the_frozen_encoder_is_paired(tmp_path):
    scores = {(0, 1e-2): [(0.7, 0.70), (0.7, 0.72)], (4, 1e-3): [(0.8, 0.75), (0.8, 0.78)]}
    text, _ = sentences(tmp_path, scores)
    assert "The frozen base with a trained head reaches 71.0 %; rank 4 differs from it by +5.50 points" in text


def test_a_partial_run_says_how_many_trials_it_covers(tmp_path):
    scores = {(1, 1e-3): [(0.8, 0.8)] * 9}
    _, caution = sentences(tmp_path, scores, trials=[f"t{k}" for k in range(18)], finished=None)
    assert caution.startswith("Partial run: 9 of 18 trials. Everything here may change when the others finish.")
    _, caution = sentences(tmp_path / "end", scores, finished=None)
    assert caution.startswith("The study has not recorded its end")


RATES = {1: "Only one learning rate was tried per rank", 2: "Only two learning rates were tried per rank", 3: None}


@pytest.mark.parametrize(("count", "warning"), RATES.items())
def test_too_few_learning_rates_are_a_caution(tmp_path, count, warning):
    rates = (1e-3, 2e-3, 4e-3)
    scores = {(r, rate): [(0.8 + r / 100 - abs(rate - 2e-3), 0.8)] for r in (1, 2) for rate in rates[:count]}
    _, caution = sentences(tmp_path, scores)
    assert warning in caution if warning else caution == ""


def test_a_rate_at_the_edge_of_the_grid_is_a_caution(tmp_path):
    scores = {(r, rate): [(0.8 - rate, 0.8)] for r in (1, 2) for rate in (1e-3, 2e-3, 4e-3)}
    _, caution = sentences(tmp_path, scores)
    assert "lowest or highest one tried at rank 1, 2." in caution


def test_validation_only_is_a_caution(tmp_path):
    text, caution = sentences(tmp_path, {(1, 1e-3): [(0.8, None)] * 2})
    assert "the validation accuracy is 80.0 %" in text
    assert "No test accuracy was recorded" in caution
