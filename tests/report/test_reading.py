"""A run folder is read whatever interrupted it; what is damaged is named by file and line."""

import json

import pytest

from lorax_kit.files.staging import replace_file
from lorax_kit.report import RunFolderError, read_run, write_report
from tests.report import fake_run


@pytest.fixture
def run(tmp_path):
    return fake_run.build(tmp_path / "run", ranks=(1, 4), seeds=2, steps=5, sites=fake_run.SITES[:2])


def test_every_record_is_read_as_written(run):
    found = read_run(run)
    written = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    assert sorted(found.trials, key=lambda t: t["trial"]) == sorted(written, key=lambda t: t["trial"])
    assert [(t["rank"], t["seed"]) for t in found.trials] == [(0, 0), (0, 1), (1, 0), (1, 1), (4, 0), (4, 1)]
    assert len(found.curves) == 6 * 5
    assert len(found.spectra) == 4 * 2
    assert found.study == json.loads((run / "study.json").read_text())
    assert (found.planned, found.finished, found.notes) == (6, True, ())


@pytest.mark.parametrize(("name", "left"), [("trials", (5, 30, 8)), ("curves", (6, 29, 8)), ("spectra", (6, 30, 7))])
def test_a_line_cut_off_at_the_end_is_left_out_and_noted(run, name, left):
    file = run / f"{name}.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    found = read_run(run)
    assert (len(found.trials), len(found.curves), len(found.spectra)) == left
    assert found.notes == (f"The last line of {name}.jsonl was cut off by an interruption and is left out.",)


BROKEN = {
    "{": "not valid JSON",
    "[1]": "holds a list, expected an object",
    '{"trial": "t", "rank": 1}': "lacks 'lr', 'seed', 'status' (has trial, rank)",
    '{"trial": "t", "rank": "four", "lr": 1, "seed": 0, "status": "done"}': "'rank' is 'four', expected a number",
    '{"trial": "t", "rank": 1, "lr": null, "seed": 0, "status": "done"}': "'lr' is None, expected a number",
    '{"trial": "t", "rank": 1, "lr": 1, "seed": 0, "status": "done", "val_accuracy": "80"}': "'val_accuracy' is '80'",
}


@pytest.mark.parametrize(("line", "complaint"), BROKEN.items())
def test_a_malformed_line_is_an_error_that_names_file_line_and_next_step(run, line, complaint):
    file = run / "trials.jsonl"
    lines = file.read_text().splitlines()
    lines[2] = line
    file.write_text("\n".join(lines) + "\n")
    before = sorted(run.rglob("*"))
    with pytest.raises(RunFolderError) as error:
        write_report(run)
    assert f"'{file}', line 3: {complaint}" in str(error.value)
    assert "next: mend or delete that line" in str(error.value)
    assert sorted(run.rglob("*")) == before, "nothing is written by a call that fails"


def test_a_complete_but_malformed_last_line_is_an_error_too(run):
    with open(run / "curves.jsonl", "a") as file:
        file.write('{"trial": "t"\n')
    with pytest.raises(RunFolderError, match=r"curves.jsonl', line 31: not valid JSON"):
        read_run(run)


def test_a_missing_folder_or_file_is_named(run, tmp_path):
    with pytest.raises(RunFolderError, match=r"nowhere' is not a run folder: no such folder"):
        read_run(tmp_path / "nowhere")
    (run / "trials.jsonl").rename(run / "kept")
    with pytest.raises(RunFolderError, match=r"no finished trial: trials.jsonl does not exist"):
        read_run(run)
    (run / "trials.jsonl").write_text('{"trial": ')
    with pytest.raises(RunFolderError, match=r"no finished trial: trials.jsonl holds no complete line"):
        read_run(run)
    (run / "study.json").write_text("[]")
    with pytest.raises(RunFolderError, match=r"study.json' holds a list, expected an object"):
        read_run(run)
    (run / "study.json").write_text('{"name"')
    with pytest.raises(RunFolderError, match=r"study.json' is not valid JSON"):
        read_run(run)
    (run / "study.json").unlink()
    with pytest.raises(RunFolderError, match=r"is not a run folder: it has no study.json"):
        read_run(run)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"compiles": "y"}, "'compiles' is 'y', and must be a whole number"),
        ({"seconds": True}, "'seconds' is True, and must be a number"),
        ({"design": ["a"]}, r"'design' is \['a'\], and must be an object"),
        ({"trials": 5}, "'trials' is 5, and must be a list"),
        ({"groups": [[1]]}, "'groups' must hold objects alone"),
    ],
)
def test_a_study_of_another_form_is_told(run, wrong, message):
    info = json.loads((run / "study.json").read_text())
    (run / "study.json").write_text(json.dumps(info | wrong))
    with pytest.raises(RunFolderError, match=message):
        read_run(run)
    (run / "study.json").write_text(json.dumps(info | dict.fromkeys(wrong)))
    assert len(read_run(run).trials) == 6


def test_curves_and_spectra_may_be_absent(run):
    (run / "curves.jsonl").unlink()
    (run / "spectra.jsonl").unlink()
    found = read_run(run)
    assert (len(found.trials), found.curves, found.spectra, found.notes) == (6, (), (), ())


def test_the_later_record_of_a_trial_counts(run):
    first = json.loads((run / "trials.jsonl").read_text().splitlines()[0])
    curve = json.loads((run / "curves.jsonl").read_text().splitlines()[0])
    with open(run / "trials.jsonl", "a") as file:
        file.write(json.dumps(first | {"val_accuracy": 0.125}) + "\n")
    with open(run / "curves.jsonl", "a") as file:
        file.write(json.dumps(curve | {"loss": 0.25}) + "\n")
    found = read_run(run)
    assert len(found.trials) == 6
    assert next(t for t in found.trials if t["trial"] == first["trial"])["val_accuracy"] == 0.125
    again = [c for c in found.curves if (c["trial"], c["step"]) == (curve["trial"], curve["step"])]
    assert [c["loss"] for c in again] == [0.25]
    assert found.notes == (
        "Trials recorded more than once (a resumed run): 1 earlier records are superseded by the later one.",
    )


def test_an_interrupted_run_counts_the_planned_trials_not_those_of_the_groups(tmp_path):
    run = fake_run.build(tmp_path, ranks=(1, 2, 4, 8, 16), seeds=3, steps=2, spectra=False, keep=9)
    info = json.loads((run / "study.json").read_text())
    # A group that was interrupted is recorded again when it is redone: counting them would give 36.
    (run / "study.json").write_text(json.dumps(info | {"groups": 2 * info["groups"]}))
    found = read_run(run)
    assert (len(found.trials), found.planned, found.finished) == (9, 18, False)


def test_replacing_a_file_leaves_the_old_one_if_it_fails(tmp_path):
    file = tmp_path / "deep" / "page.html"
    replace_file(file, b"old")
    with pytest.raises(TypeError):
        replace_file(file, "not bytes")
    assert file.read_bytes() == b"old"
    replace_file(file, b"new")
    assert file.read_bytes() == b"new"
    assert [p.name for p in file.parent.iterdir()] == ["page.html"], "no partial file is left behind"
    assert file.stat().st_mode & 0o777 == 0o644


def test_a_reader_never_sees_half_of_a_replaced_file(tmp_path):
    file = tmp_path / "page.html"
    replace_file(file, b"a" * 100_000)
    with open(file, "rb") as reader:
        start = reader.read(50_000)
        replace_file(file, b"b" * 100_000)
        assert start + reader.read() == b"a" * 100_000
    assert file.read_bytes() == b"b" * 100_000
