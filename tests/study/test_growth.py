"""A folder grows: what is missing is trained, what is there stays, what cannot be compared is refused."""

import importlib
import json
import shutil

import pytest

import lorax_kit as lk
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")


def study(**changes):
    return tiny.study(**{"rank": [1, 2], "seed": range(3), "steps": 6} | changes)


def run(out, one, problem=None, **options):
    return lk.run(one, problem or tiny.problem(), out=out, progress=False, **options)


def measured(row):
    return {k: v for k, v in row.items() if isinstance(v, float) and k.startswith(("train_l", "val_", "test_"))}


def test_a_study_of_three_seeds_grown_to_six_equals_one_of_six(tmp_path):
    whole = run(tmp_path / "whole", study(seed=range(6)))
    three = run(tmp_path / "grown", study())
    before = (tmp_path / "grown" / "trials.jsonl").read_text()
    six = run(tmp_path / "grown", study(seed=range(6)))
    assert (tmp_path / "grown" / "trials.jsonl").read_text().startswith(before)
    assert [row["trial"] for row in six.rows] == [row["trial"] for row in whole.rows]
    for ours, theirs in zip(six.rows, whole.rows, strict=True):
        assert measured(ours) == pytest.approx(measured(theirs), abs=1e-5)
    assert {row["trial"] for row in three.rows} < {row["trial"] for row in six.rows}


def test_ranks_rates_and_methods_are_added_and_no_finished_trial_is_trained_again(tmp_path):
    run(tmp_path / "run", study())
    taken = []

    def stream(seed, start):
        for batch in tiny.stream(seed, start):
            taken.append(1)
            yield batch

    problem = tiny.problem(train=stream)
    taken.clear()
    more = study(grids=[{"rank": [1, 2, 4], "lr": [1e-2, 3e-3]}, {"variant": "dora", "rank": 2}], seed=range(2), rank=1)
    grown = run(tmp_path / "run", more, problem)
    assert len(taken) == 1 + 2 * 6  # one look, and two programs: LoRA's new trials, and DoRA's
    assert len(grown.rows) == len(more.trials()) == 12 + 2 + 2
    info = json.loads((tmp_path / "run" / "study.json").read_text())
    assert set(info["trials"]) == {t.name for t in (*study().trials(), *more.trials())}
    assert len((tmp_path / "run" / "trials.jsonl").read_text().splitlines()) == len(info["trials"])
    alone = run(tmp_path / "alone", more)
    for ours, theirs in zip(grown.rows, alone.rows, strict=True):
        assert measured(ours) == pytest.approx(measured(theirs), abs=1e-5)


def test_an_interrupted_growth_goes_on_to_the_same_bits(tmp_path):
    whole = tmp_path / "whole"
    run(whole, study())
    run(whole, study(seed=range(6)), memory_bytes=22_000)
    broken = tmp_path / "broken"
    run(broken, study())
    taken = []

    def stream(seed, start):
        for batch in tiny.stream(seed, start):
            taken.append(1)
            if len(taken) == 9:
                raise KeyboardInterrupt
            yield batch

    problem = tiny.problem(train=stream)
    taken.clear()
    with pytest.raises(KeyboardInterrupt):
        run(broken, study(seed=range(6)), problem, memory_bytes=22_000)
    run(broken, study(seed=range(6)), memory_bytes=10**9)
    ours, theirs = (
        {row["trial"]: measured(row) for row in map(json.loads, (f / "trials.jsonl").read_text().splitlines())}
        for f in (broken, whole)
    )
    assert ours == theirs


BAD = [
    ({"steps": 7}, {}, "it differs in steps: 6 there, 7 here"),
    ({"schedule": "constant"}, {}, 'it differs in schedule: "linear" there, "constant" here'),
    ({"clip": None}, {}, "it differs in clip: 1.0 there, null here"),
    ({"targets": {"upper": ["up/kernel"]}}, {}, "targets 'upper' are ['{up,down}/kernel'] in"),
    ({}, {"test": [tiny.points(9, 8)]}, "it differs in data"),
    ({}, {"metrics": ["accuracy", "perplexity"]}, "it differs in metrics"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import jax

    out = tmp_path_factory.mktemp("growth") / "run"
    with jax.numpy_dtype_promotion("standard"):
        run(out, study(rank=[1], seed=[0], probe_lr=()))
    return out


@pytest.mark.parametrize(("changes", "problem", "says"), BAD, ids=[b[2][:30] for b in BAD])
def test_what_cannot_be_compared_is_refused_and_says_what_differs(folder, changes, problem, says):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(lk.StudyError) as e:
        run(folder, study(rank=[1, 2], seed=[0], probe_lr=(), **changes), tiny.problem(**problem))
    assert says in str(e.value)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_folder_that_another_process_wrote_to_meanwhile_is_read_again(tmp_path, monkeypatch):
    """Between reading and locking it another process runs a study, which would be trained twice, or forgotten."""
    module = importlib.import_module("lorax_kit.study.run")
    ready = module.ready

    def slow():
        monkeypatch.setattr(module, "ready", ready)
        run(tmp_path / "run", study(rank=[1], seed=[1]))

    monkeypatch.setattr(module, "ready", slow)
    ours = study(rank=[1], seed=[0, 1])
    with pytest.raises(lk.errors.StudyError, match=r"another process wrote to .* meanwhile"):
        run(tmp_path / "run", ours)
    found = run(tmp_path / "run", ours)
    rows = [json.loads(line)["trial"] for line in (tmp_path / "run" / "trials.jsonl").read_text().splitlines()]
    assert sorted(rows) == sorted(row["trial"] for row in found.rows)


@pytest.mark.parametrize("name", ["study.json", "trials.jsonl", "adapters"])
def test_what_lies_in_the_way_is_named(name, tmp_path):
    run(tmp_path / "run", study(rank=[1], seed=[0]))
    place = tmp_path / "run" / name
    if name == "adapters":
        shutil.rmtree(place)
        place.write_text("")
    else:
        place.unlink()
        place.mkdir()
    with pytest.raises(lk.errors.StudyError, match=name):
        run(tmp_path / "run", study(rank=[1], seed=[0, 1]))


def test_a_study_of_another_form_is_not_gone_on_with(tmp_path):
    run(tmp_path / "run", study(rank=[1], seed=[0]))
    file = tmp_path / "run" / "study.json"
    info = json.loads(file.read_text())
    del info["lorax_crc32"]  # as by hand: what is sealed is told as damaged before
    for wrong in ({"compiles": "y"}, {"stacks": [1]}, {"leaves": 3}):
        file.write_text(json.dumps(info | wrong))
        with pytest.raises(lk.errors.StudyError, match=f"is damaged: '{next(iter(wrong))}'"):
            run(tmp_path / "run", study(rank=[1], seed=[0, 1]))
    file.write_text(json.dumps(info))
    assert len(run(tmp_path / "run", study(rank=[1], seed=[0, 1])).rows) == 4  # with the probes
