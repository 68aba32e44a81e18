"""Rates are chosen on validation, results reported on test, and diverged trials counted but never averaged."""

import json
import math
import shlex

import numpy as np
import pytest

from lorax_kit.report import read_run
from lorax_kit.report.answer import answer, cautions
from lorax_kit.report.claims import more_seeds
from lorax_kit.report.conditions import Family, at_edge_of_grid, rates_tried, summarise
from lorax_kit.report.tables.summary import summary_rows
from tests.report import fake_run

LORA = Family("attention", "lora", "α = 16")


def summary(folder, scores):
    return summarise(read_run(fake_run.from_scores(folder, scores)))


def test_the_rate_is_chosen_on_validation_and_the_result_reported_on_test(tmp_path):
    scores = {(4, 1e-3): [(0.80, 0.70), (0.82, 0.72)], (4, 1e-2): [(0.78, 0.90), (0.79, 0.92)]}
    found = summary(tmp_path, scores)
    assert found.metric == "test_accuracy"
    assert (found.best.rank, found.best.lr) == (4, 1e-3)
    assert found.best.mean("test_accuracy") == pytest.approx(0.71, abs=1e-15)
    assert found.best.mean("val_accuracy") == pytest.approx(0.81, abs=1e-15)


def test_the_best_rank_is_chosen_on_validation_too(tmp_path):
    found = summary(tmp_path, {(1, 1e-3): [(0.80, 0.95)] * 2, (8, 1e-3): [(0.81, 0.75)] * 2})
    assert found.best.rank == 8
    assert [c.difference for c in found.comparisons] == [pytest.approx(0.20)]


def test_without_test_accuracies_validation_is_reported(tmp_path):
    found = summary(tmp_path, {(1, 1e-3): [(0.80, None), (0.70, None)]})
    assert found.metric == "val_accuracy"
    assert found.best.interval(found.metric).mean == pytest.approx(0.75)


def test_diverged_trials_are_left_out_of_means_and_counted(tmp_path):
    found = summary(tmp_path, {(2, 1e-3): [(0.6, 0.5), None, (0.8, 0.7), None]})
    (condition,) = found.conditions
    assert condition.values("test_accuracy").tolist() == [0.5, 0.7]
    assert condition.mean("test_accuracy") == pytest.approx(0.6)
    assert (len(condition.trials), len(condition.done), len(found.failed)) == (4, 2, 2)


def test_a_rate_that_diverged_for_some_seeds_cannot_win_by_its_survivors(tmp_path):
    found = summary(tmp_path, {(2, 1e-3): [(0.6, 0.6)] * 3, (2, 1e-2): [(0.9, 0.9), None, None]})
    assert found.best.lr == 1e-3
    assert [c.lr for c in found.ladders[LORA]] == [1e-3]


def test_nothing_is_best_if_everything_diverged(tmp_path):
    found = summary(tmp_path, {(2, 1e-3): [None, None], (4, 1e-3): [None, None]})
    assert found.best is None
    assert found.comparisons == ()
    assert math.isnan(found.conditions[0].mean("test_accuracy"))
    assert found.conditions[0].interval("test_accuracy").method == "no finished trial"
    assert [c.rank for c in found.ladder] == [2, 4]


def test_the_probe_is_apart_from_the_ladder_and_compared(tmp_path):
    found = summary(tmp_path, {(0, 1e-2): [(0.7, 0.6)] * 2, (0, 1e-1): [(0.6, 0.9)] * 2, (1, 1e-3): [(0.8, 0.8)] * 2})
    assert (found.probe.rank, found.probe.lr) == (0, 1e-2)
    assert (found.ranks, found.rates) == ((1,), (1e-3,))
    (comparison,) = found.comparisons
    assert comparison.condition == ("head", "lora", "", "", 0)
    assert comparison.difference == pytest.approx(-0.2)


def test_comparisons_pair_the_seeds_that_finished_in_both(tmp_path):
    found = summary(
        tmp_path,
        {(1, 1e-3): [(0.5, 0.50), None, (0.5, 0.60)], (4, 1e-3): [(0.7, 0.70), (0.7, 0.10), (0.7, 0.90)]},
    )
    (comparison,) = found.comparisons
    assert (comparison.pairs, comparison.unpaired) == (2, 1)
    assert comparison.difference == pytest.approx(((0.5 - 0.7) + (0.6 - 0.9)) / 2)


def test_only_three_or_more_rates_have_an_edge(tmp_path):
    two = summary(tmp_path / "a", {(1, 1e-3): [(0.8, 0.8)], (1, 1e-2): [(0.7, 0.7)]})
    assert at_edge_of_grid(two) == ()
    scores = {(r, lr): [(0.8 - abs(lr - best), 0.8)] for r, best in ((1, 1e-2), (4, 2e-2)) for lr in (5e-3, 1e-2, 2e-2)}
    three = summary(tmp_path / "b", scores)
    assert [c.rank for c in at_edge_of_grid(three)] == [4]
    assert [rates_tried(three, c) for c in three.ladder] == [3, 3]


ALPHAS = {
    "constant": ((16,), {"α = 16"}),
    "two constants": ((8, 16), {"α = 8", "α = 16"}),
    "the rank": ((lambda r: r,), {"α = r"}),
    "twice the rank": ((lambda r: 2 * r,), {"α = 2r"}),
    "free": ((lambda r: {1: 8, 4: 12, 8: 40}[r],), {"α set per rank"}),
}


@pytest.mark.parametrize(("alphas", "names"), ALPHAS.values(), ids=ALPHAS)
def test_an_alpha_policy_is_one_family_along_the_ranks(tmp_path, alphas, names):
    run = fake_run.build(tmp_path, ranks=(1, 4, 8), seeds=1, steps=1, alphas=alphas, spectra=False, probe=False)
    found = summarise(read_run(run))
    assert {family.policy for family in found.ladders} == names
    assert all([c.rank for c in ladder] == [1, 4, 8] for ladder in found.ladders.values())


def test_target_sets_and_variants_are_families_with_their_own_trials(tmp_path):
    run = fake_run.build(
        tmp_path, ranks=(1, 4), seeds=2, steps=1, targets=("attention", "all"), variants=("lora", "dora"), spectra=False
    )
    found = summarise(read_run(run))
    assert len(found.ladders) == 4
    for family, ladder in found.ladders.items():
        for condition in ladder:
            own = [
                t["test_accuracy"]
                for t in found.run.trials
                if (t["targets"], t["variant"], t["rank"]) == (family.targets, family.variant, condition.rank)
            ]
            assert condition.values("test_accuracy").tolist() == own
            assert len(own) == 2


def test_two_trials_of_one_seed_are_noted_not_an_error(tmp_path):
    run = fake_run.build(
        tmp_path, ranks=(1, 4), seeds=2, steps=1, spectra=False, probe=False, change=lambda t: {"seed": 0}
    )
    found = summarise(read_run(run))
    assert found.notes[0] == "Rank 1 (attention, lora, α = 16) has several trials of the same seed."
    values = {c.rank: c.values("test_accuracy") for c in found.conditions}
    (other,) = {1, 4} - {found.best.rank}
    assert found.comparisons[0].pairs == 2
    assert found.comparisons[0].difference == pytest.approx(np.mean(values[other] - values[found.best.rank]))


def test_every_further_setting_tells_conditions_apart(tmp_path):
    """Two dropouts and two optimisers at each rank and rate: four families of three seeds each, none mixed."""
    settings = [
        {"dropout": d, "optimizer": o, "dtype": None, "hyper_beta": 2.0} for d in (0.0, 0.1) for o in ("adamw", "lion")
    ]
    run = fake_run.build(tmp_path, ranks=(1, 4), seeds=12, steps=1, spectra=False, probe=False)
    rows = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    rows = [r | settings[r["seed"] // 3] | {"seed": r["seed"] % 3} for r in rows]
    fake_run.write_lines(run / "trials.jsonl", rows)
    found = summarise(read_run(run))
    assert [family.rest for family in found.ladders] == ["", "dropout 0.1", "dropout 0.1, lion", "lion"]
    assert str(list(found.ladders)[2]) == "attention, lora, α = 16, dropout 0.1, lion"
    for family, ladder in found.ladders.items():
        wanted = {
            "dropout": 0.1 * ("dropout" in family.rest),
            "optimizer": "lion" if "lion" in family.rest else "adamw",
        }
        for condition in ladder:
            own = [r["test_accuracy"] for r in rows if r["rank"] == condition.rank and wanted.items() <= r.items()]
            assert condition.values("test_accuracy").tolist() == own
            assert len(own) == 3
    assert not found.notes


def test_a_rank_that_was_stopped_everywhere_claims_no_rate(tmp_path):
    def change(t):
        stopped = t["rank"] == 1 or (t["rank"] == 2 and t["lr"] != 1e-3)
        return {"status": "stopped", "stopped_at": 5, "steps": int(5e3 * t["lr"])} if stopped else {}

    design = {"design": {"stop": {"kind": "halving", "first": 5}}}
    run = fake_run.build(
        tmp_path,
        ranks=(1, 2, 4),
        rates=(3e-4, 1e-3, 3e-3),
        seeds=2,
        spectra=False,
        probe=False,
        change=change,
        study=design,
    )
    found = summarise(read_run(run))
    row = next(row for row in summary_rows(found) if row["rank"] == "1")
    assert (row["rate"], row["seeds"]) == ("–", "0 (+6 stopped)")
    assert next(c for c in found.ladder if c.rank == 1).lr == 3e-3  # which lasted longest
    text = "\n".join([*answer(found), *cautions(found)])
    assert "at rank 1" not in text
    if found.best.rank == 2:
        assert "of rank 1 all trials were stopped early" in text
    sentence, command = more_seeds(found)
    assert "does not grow: another folder" in sentence
    words = shlex.split(command)
    assert words[words.index("--out") + 1] == f"{run}-{words[-1]}-seeds"


def test_finished_trials_without_a_finite_metric_are_told(tmp_path):
    def change(t):
        return {"val_accuracy": None} if t["seed"] == 0 else {}

    run = fake_run.build(tmp_path, ranks=(1, 4), seeds=3, spectra=False, probe=False, change=change)
    assert "2 finished trials with no finite val accuracy, such as r1_" in "\n".join(cautions(summarise(read_run(run))))


def test_trials_that_were_stopped_early_enter_no_mean(tmp_path):
    def change(t):
        behind = t["rank"] == 4 and t["seed"] > 1
        return {"status": "stopped", "stopped_at": 40 + t["seed"], "val_accuracy": 0.1} if behind else {}

    run = fake_run.build(tmp_path, ranks=(1, 4), seeds=4, steps=50, spectra=False, probe=False, change=change)
    found = summarise(read_run(run))
    condition = next(c for c in found.conditions if c.rank == 4)
    assert condition.values("val_accuracy").size == 2
    assert min(condition.values("val_accuracy")) > 0.5
    assert (len(found.stopped), found.failed, found.lost) == (2, (), "were stopped early")
    assert found.best.rank == 1, "rank 4 has fewer seeds"
    assert "Stopped early: 2 of 8 trials, at steps 42 to 43" in "\n".join(cautions(found))
    assert {row["rank"]: row["seeds"] for row in summary_rows(found)} == {"1": "4", "4": "2 (+2 stopped)"}
