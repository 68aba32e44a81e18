"""Early stopping: who goes on, that those who do are as if alone, that kills change nothing, what rows say."""

import json
import math

import jax
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.report import read_run, write_report
from lorax_kit.study.design.trial import Trial
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")

CHECKED = 3
"""Batches that are read when a problem is made."""
THREE_EACH = 12_000
"""Bytes in which three trials fit, one of them at a time."""
RATES = [1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


def study(**changes):
    settings = {"rank": [2], "lr": RATES, "seed": [0, 1], "probe_lr": (), "steps": 18, "stop": lk.Halving(first=2)}
    return tiny.study(**settings | changes)


def run(out, one, problem=None, **options):
    return lk.run(one, problem or tiny.problem(), out=out, progress=False, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"):
        return run(tmp_path_factory.mktemp("race") / "whole", study(stop=None, eval_every=2))


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"):
        return run(tmp_path_factory.mktemp("race") / "raced", study(), memory_bytes=THREE_EACH)


def measured(row):
    return {k: v for k, v in row.items() if isinstance(v, float) and k.startswith(("train_l", "val_", "test_"))}


def test_those_who_go_on_are_as_if_nobody_had_stopped(whole, raced):
    """Two of six conditions reach step 6, one the end: 12 x 2 + 4 x 4 + 2 x 12 of 12 x 18 steps."""
    full = {row["trial"]: row for row in whole.rows}
    done = [row for row in raced.rows if row["status"] == "done"]
    assert len(done) == 2
    for row in done:
        assert measured(row) == pytest.approx(measured(full[row["trial"]]), abs=1e-5)
    assert sorted(row["stopped_at"] for row in raced.rows if row["status"] == "stopped") == [2] * 8 + [6] * 2
    assert sum(row["steps"] for row in raced.rows) == 8 * 2 + 2 * 6 + 2 * 18
    assert all(row["test_loss"] is None and row["adapter"] is None for row in raced.rows if row["stopped_at"])
    assert not (raced.path / "rungs").exists()


def test_the_rule_is_successive_halving_on_validation(whole, raced):
    """By hand from the whole grid's validations at steps 2 and 6: means over seeds, the best third goes on."""
    curves = [json.loads(line) for line in (whole.path / "curves.jsonl").read_text().splitlines()]
    at = {(c["trial"], c["step"]): c["val_accuracy"] for c in curves if "val_accuracy" in c}

    def mean(lr, step):
        return np.mean([at[row["trial"], step] for row in whole.rows if row["lr"] == lr])

    first = sorted(RATES, key=lambda lr: -mean(lr, 2))[:2]
    last = sorted(first, key=lambda lr: -mean(lr, 6))[:1]
    assert {row["lr"] for row in raced.rows if row["status"] == "done"} == set(last)
    assert {row["lr"] for row in raced.rows if row["steps"] >= 6} == set(first)
    for row in raced.rows:
        if row["status"] == "stopped":
            assert row["val_accuracy"] == pytest.approx(at[row["trial"], row["stopped_at"]])


def test_stopped_trials_never_enter_a_mean(raced):
    page = write_report(raced.path).read_text()
    rows = {row["trial"]: row for row in read_run(raced.path).trials}
    assert len(rows) == 12
    best = raced.best()
    assert best["status"] == "done"
    assert "stopped" in page


@pytest.mark.parametrize("after", [3, 9, 12, 17, 21])
def test_kills_change_nothing(raced, tmp_path, after):
    """Groups of different rungs, a rung's end, the last rung; Ctrl-C saves, a kill does not."""
    for error in (KeyboardInterrupt, SystemError):
        out, taken = tmp_path / error.__name__, []

        def stream(seed, start, taken=taken, error=error):
            for batch in tiny.stream(seed, start):
                taken.append(1)
                if len(taken) == CHECKED + after:
                    raise error
                yield batch

        with pytest.raises(error):
            run(out, study(), tiny.problem(train=stream), memory_bytes=THREE_EACH)
        going = run(out, study(), memory_bytes=10**9)
        assert [measured(row) for row in going.rows] == [measured(row) for row in raced.rows]
        assert [row["status"] for row in going.rows] == [row["status"] for row in raced.rows]


def test_the_median_rule_stops_what_was_never_as_good_as_the_median_on_average():
    rule = lk.MedianRule(first=5, every=5)
    assert rule.rungs(20) == (5, 10, 15, 20)
    trials = [Trial(rank=r, alpha=1, lr=1e-3, seed=s, targets="t") for r in (1, 2, 3) for s in (0, 1)]
    values = {1: [0.5, 0.2], 2: [0.4, 0.6], 3: [0.1, 0.3]}
    histories = {t.name: values[t.rank] for t in trials}
    # Running averages 0.35, 0.5, 0.2: the median is 0.35, which rank 3 with at most 0.3 never reached.
    assert {t.rank for t in trials if t.name in rule.survivors(trials, histories)} == {1, 2}


def test_conditions_compete_within_the_axes_that_are_named_and_seeds_stay_together():
    trials = [Trial(rank=r, alpha=1, lr=lr, seed=s, targets="t") for r in (1, 2) for lr in (1, 2, 3) for s in (0, 1)]
    histories = {t.name: [t.rank * 10 + t.lr + (5 if t.seed else -5)] for t in trials}
    within = lk.Halving(first=1, within=["rank"]).survivors(trials, histories)
    assert within == {t.name for t in trials if t.lr == 3}
    over = lk.Halving(first=1).survivors(trials, histories)
    assert over == {t.name for t in trials if t.rank == 2 and t.lr in (2, 3)}
    alone = lk.Halving(first=1, by="trial", keep=0.25).survivors(trials, histories)
    assert alone == {t.name for t in trials if t.rank == 2 and t.seed == 1}
    histories = {name: [math.nan] for name in histories}
    assert len(lk.Halving(first=1).survivors(trials, histories)) == 4


BAD = [
    ({"stop": {"kind": "halve", "first": 2}}, "study stop has the kind 'halve'; choose from halving, median"),
    ({"stop": {"kind": "halving"}}, "study stop lacks 'first'"),
    ({"stop": {"kind": "halving", "first": 2, "eta": 3}}, "study stop has the unknown key 'eta'"),
    ({"stop": {"kind": "halving", "first": 0}}, "halving first is 0; it must be an integer of at least 1"),
    ({"stop": {"kind": "halving", "first": 2, "keep": 1}}, "halving keep is 1; it must lie between 0 and 1"),
    ({"stop": {"kind": "halving", "first": 2, "within": ["seed"]}}, "within holds 'seed', which is no axis"),
    ({"stop": {"kind": "median", "first": 2}}, "study stop lacks 'every'"),
    ({"stop": lk.Halving(first=18)}, "study stop begins at step 18, and there are 18"),
    ({"stop": 3}, "study stop is 3; it must be lk.Halving(...) or an object"),
]


@pytest.mark.parametrize(("changes", "says"), BAD, ids=[says[:40] for _, says in BAD])
def test_rules_that_say_nothing_are_refused(changes, says):
    with pytest.raises(lk.StudyError) as e:
        study(**changes)
    assert says in str(e.value)


def test_a_study_with_a_rule_survives_json():
    one = study(stop=lk.Halving(first=2, keep=0.5, within=["rank"], by="trial"))
    assert lk.Study.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_a_stopped_trial_took_its_own_share_of_the_time(tmp_path):
    rows = run(tmp_path / "run", study(steps=10, stop=lk.Halving(first=9, keep=0.5))).rows
    stopped, done = ([row["train_seconds"] for row in rows if row["status"] == s] for s in ("stopped", "done"))
    # Nine steps of ten; a share of the share of twelve trials would be a twelfth.
    assert sorted(stopped)[len(stopped) // 2] > 0.15 * sorted(done)[len(done) // 2]
