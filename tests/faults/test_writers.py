"""Several writers of one path at once, and clocks that jump: one waits or is refused in a line, results stay whole."""

import os
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.checkpoint.seal import seal
from lorax_kit.errors import LoraxError
from lorax_kit.files.lines import append
from lorax_kit.files.staging import clear_stale, replace_file, sole_writer, staged
from lorax_kit.report import read_run
from lorax_kit.study.folder.store import RunStore
from tests import tiny
from tests.faults import made
from tests.faults.processes import Process
from tests.faults.verdict import in_words, left_over, outcome

MEANWHILE = 8


def at_once(calls):
    """Errors of calls made at the same time, each in a thread."""
    errors, ready = [], threading.Barrier(len(calls))

    def run(call):
        ready.wait()
        try:
            call()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("round_", range(6))
def test_writers_of_one_adapter_leave_one_of_theirs_whole(overwrite, round_, tmp_path, injected):
    injected("concurrent writers", MEANWHILE)
    if overwrite:
        made.save_adapter(tmp_path / "a")
    kinds = [made.FACTORS, made.OTHERS] * (MEANWHILE // 2)

    def write(factors):
        with staged(tmp_path / "a", overwrite) as new:
            new.mkdir()
            for i, x in enumerate(jax.tree.leaves(factors)):
                np.save(new / f"{i}.npy", x)
            (new / "spec").mkdir()
            seal(new)

    errors = at_once([lambda factors=factors: write(factors) for factors in kinds])
    assert all(in_words(e, tmp_path / "a") for e in errors)
    assert overwrite or len(errors) == MEANWHILE - 1
    first = np.load(tmp_path / "a" / "0.npy")
    assert any((first == jax.tree.leaves(x)[0]).all() for x in kinds)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("first", [Path.mkdir, Path.touch])
@pytest.mark.parametrize("second", [Path.mkdir, Path.touch])
def test_without_overwrite_the_second_writer_is_refused(first, second, unseen, tmp_path, monkeypatch, injected):
    """`unseen`: the first writer comes after the second has looked."""
    injected("concurrent writers")

    def write(make):
        with staged(tmp_path / "a", overwrite=False) as new:
            make(new)
            if make is Path.mkdir:
                (new / "file").touch()

    with pytest.raises(LoraxError, match="written by another process meanwhile"), staged(tmp_path / "a", False) as new:
        second(new)
        write(first)
        if unseen:
            monkeypatch.setattr(os.path, "lexists", lambda path: False)
    monkeypatch.undo()
    assert (tmp_path / "a").is_dir() is (first is Path.mkdir)
    assert left_over(tmp_path) == []


def test_an_interruption_as_the_staging_folder_is_made_leaves_none(tmp_path, monkeypatch, injected):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    injected("signal SIGINT")
    monkeypatch.setattr("lorax_kit.files.staging._locked", interrupted)
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "a", overwrite=True):
        pass
    monkeypatch.undo()
    assert left_over(tmp_path) == []


def test_writers_of_one_file_never_leave_a_part(tmp_path, injected):
    file, contents = tmp_path / "page.html", [bytes([65 + i]) * 200_000 for i in range(MEANWHILE)]
    for _ in range(5):
        injected("concurrent writers", MEANWHILE)
        assert at_once([lambda text=text: replace_file(file, text) for text in contents]) == []
        assert file.read_bytes() in contents
    assert left_over(tmp_path) == []


def test_lines_of_several_writers_stay_whole(tmp_path, injected):
    file = tmp_path / "rows.jsonl"
    injected("concurrent writers", MEANWHILE)
    lines = [f"{i}" * 5000 + "\n" for i in range(MEANWHILE)]
    assert at_once([lambda line=line: append(file, line) for line in lines]) == []
    assert sorted(file.read_text().splitlines(keepends=True)) == sorted(lines)


def test_a_run_folder_a_training_and_a_comparison_have_one_writer(things, tmp_path, injected):
    from lorax_kit.cli import main

    def train():
        main([*made.TRAIN, str(tmp_path / "t")])

    (tmp_path / "t").mkdir()
    for folder, call in (
        (things["run"], lambda: lk.run(made.STUDY, tiny.problem(), out=things["run"], progress=False)),
        (tmp_path / "t", train),
    ):
        injected("concurrent writers")
        with sole_writer(folder), pytest.raises((LoraxError, SystemExit)) as e:
            call()
        assert isinstance(e.value, SystemExit) or in_words(e.value, folder)
    train()
    assert len(read_run(things["run"]).trials) == 4


def between_two_renames(folder):
    """Stand still where a folder is moved away, and the new one is not in its place."""
    with staged(folder / "a", overwrite=True) as new:
        new.mkdir()
        (new / "file").write_bytes(b"new")
        (new.parent / "replaced").mkdir()
        (folder / "a").rename(new.parent / "replaced" / "a")
        time.sleep(600)


def test_staging_of_any_name_is_cleared(tmp_path, injected):
    injected("kill -9 of save")
    for name in ("a", "a\nb", " ", "ü", ".", "x" * 100):
        (tmp_path / f".{name[:40]}.abcd1234.staged").mkdir()
    clear_stale(tmp_path)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("dead", [True, False])
def test_only_the_staging_of_dead_processes_is_cleared(dead, tmp_path, injected):
    injected("kill -9 of save")
    replace_file(tmp_path / "a" / "file", b"old")
    process = Process(between_two_renames, [tmp_path], tmp_path)
    process.wait_until(lambda: not (tmp_path / "a").exists())
    if dead:
        process.kill_after(0)
        process.end()
    clear_stale(tmp_path)
    assert bool(left_over(tmp_path)) is not dead
    if not dead:
        process.kill_after(0)
        process.end()
        clear_stale(tmp_path)
    assert (tmp_path / "a" / "file").read_bytes() == b"old"
    assert left_over(tmp_path) == []


def test_a_load_finds_what_a_killed_save_had_moved_away(tmp_path, injected):
    injected("kill -9 of save")
    made.save_adapter(tmp_path / "a")
    whole = made.read_adapter(tmp_path / "a")
    staging = tmp_path / ".a.abcd1234.staged"
    (staging / "written").mkdir(parents=True)
    (staging / "replaced").mkdir()
    (tmp_path / "a").rename(staging / "replaced" / "a")
    assert made.read_adapter(tmp_path / "a") == whole
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("jump", [-1e9, -3600.0, 3600.0, 1e9])
def test_clocks_that_jump_change_no_results(things, tmp_path, jump, monkeypatch, injected):
    injected("clock jump")
    now, calls, whole = time.time, [0], made.read_adapter(things["adapter"])

    def jumping():
        calls[0] += 1
        return now() + jump * (calls[0] % 3)

    monkeypatch.setattr(time, "time", jumping)
    for name in ("study.json", "trials.jsonl"):
        file = things["run"] / name
        os.utime(file, (now() + jump, now() + jump))
    before = read_run(things["run"]).trials
    again = lk.run(made.STUDY, tiny.problem(), out=things["run"], progress=False)
    assert tuple(sorted(row["trial"] for row in again.rows)) == tuple(sorted(row["trial"] for row in before))
    for _ in range(4):
        injected("clock jump")
        saved = outcome(lambda: made.save_adapter(tmp_path / "a", overwrite=True), tmp_path)
        said, found = outcome(lambda: made.read_adapter(tmp_path / "a"), tmp_path)
        assert saved[0] or said or found == whole
    monkeypatch.undo()
    until = time.monotonic() + 30
    made.save_adapter(tmp_path / "a", overwrite=True)
    while left_over(tmp_path) and time.monotonic() < until:  # the next call clears what orbax's threads write late
        time.sleep(0.5)
        made.save_adapter(tmp_path / "a", overwrite=True)
    assert made.read_adapter(tmp_path / "a") == whole
    assert left_over(tmp_path) == []
    assert RunStore(things["run"], read_run(things["run"]).study["identity"]).finished
