"""Search by optuna: rounds ask, train and tell; the same call goes on (with the real library: interop)."""

import pytest

import lorax_kit as lk
from lorax_kit.study import search
from tests import tiny

RANGES = {"lr": {"low": 1e-4, "high": 1e-1, "log": True}, "rank": [1, 2, 4]}


def searched(out, **changes):
    study = tiny.study(seed=[0, 1], probe_lr=(), steps=6)
    settings = {"rounds": 3, "conditions": 3, "progress": False, "out": out}
    return search(study, tiny.problem(), RANGES, **settings | changes)


@pytest.mark.interop
def test_rounds_grow_one_folder_and_the_same_call_goes_on(tmp_path, standard_promotion):
    optuna = pytest.importorskip("optuna")
    results = searched(tmp_path / "run")
    conditions = {(row["lr"], row["rank"]) for row in results.rows}
    assert 7 <= len(conditions) <= 9
    assert len(results.rows) == 2 * len(conditions)
    before = (tmp_path / "run" / "trials.jsonl").read_text()
    again = searched(tmp_path / "run")
    assert (tmp_path / "run" / "trials.jsonl").read_text() == before
    assert again.rows == results.rows
    study, sampler = tiny.study(seed=[0], probe_lr=(), steps=2), optuna.samplers.RandomSampler(seed=1)
    settings = {"rounds": 1, "conditions": 4, "sampler": sampler, "out": tmp_path / "random", "progress": False}
    found = search(study, tiny.problem(), {"rank": [1, 2], "hyper.b2": {"low": 0.9, "high": 0.99}}, **settings)
    assert {row["rank"] for row in found.rows} <= {1, 2}
    assert len({row["hyper_b2"] for row in found.rows}) == 4


@pytest.mark.interop
@pytest.mark.parametrize(
    ("changes", "says"),
    [({"rounds": 0}, "search rounds is 0"), ({"conditions": "x"}, "search conditions is 'x'")],
)
def test_bad_searches_say_so(tmp_path, standard_promotion, changes, says):
    pytest.importorskip("optuna")
    with pytest.raises(lk.StudyError, match=says):
        searched(tmp_path / "run", **changes)
