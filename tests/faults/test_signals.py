"""Signals at random moments, and readers that close: quiet exits, the same call goes on to the same bits."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lorax_kit as lk
from tests import tiny
from tests.faults import made
from tests.faults.processes import Process, command
from tests.faults.test_kills import lasting
from tests.faults.verdict import left_over

ROOT = Path(__file__).parents[2]
LONG = [*made.TRAIN[:-4], "--epochs", "200", "--steps-per-epoch", "50", "--out"]


def time_of(file):
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def study(folder):
    lk.run(tiny.study(rank=[1], probe_lr=(), steps=4000), tiny.problem(), out=folder / "run", progress=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("moment", range(3))
def test_a_signal_ends_a_training_quietly(number, moment, tmp_path, injected):
    folder = tmp_path / "f"
    folder.mkdir()
    process = Process(command, [*LONG, str(folder / "t")], folder)
    process.wait_until((folder / "t/training.npz").exists)
    process.kill_after(random.Random(moment).uniform(0, 0.5), number)
    injected(f"signal {number.name}")
    code, said = process.end()
    assert code == 130, said
    assert "Traceback" not in said
    assert said.rstrip().splitlines()[-1].endswith("lorax-kit: interrupted")
    assert left_over(folder) == []


def test_a_study_killed_at_random_moments_goes_on_to_the_same_bits(tmp_path, injected):
    (tmp_path / "whole").mkdir()
    study(tmp_path / "whole")
    whole = [lasting(row) for row in made.read_folder(tmp_path / "whole/run")[0]]
    folder, draw = tmp_path / "killed", random.Random(0)
    folder.mkdir()
    for _ in range(5):  # one run, killed again and again
        saved = folder / "run/training.npz"
        before = time_of(saved)
        process = Process(study, [folder], folder)
        process.wait_until(lambda: time_of(saved) not in (None, before))  # noqa: B023
        process.kill_after(draw.uniform(0, 0.5), signal.SIGKILL)
        injected("kill -9 of study")
        process.end()
    study(folder)
    assert [lasting(row) for row in made.read_folder(folder / "run")[0]] == whole
    assert left_over(folder) == []


@pytest.mark.parametrize("closed", ["stdout before it is written", "stdout from the start", "stderr, too"])
@pytest.mark.parametrize("argv", [["inspect", "--help"], ["report", "RUN"], ["report", "RUN", "--json"]], ids=str)
def test_a_reader_that_closes_ends_a_command_quietly(things, closed, argv, injected, tmp_path):
    argv = [str(things["run"]) if x == "RUN" else x for x in argv]
    read, write = os.pipe()
    os.close(read)
    injected("stdout closed")
    call = [sys.executable, "-m", "lorax_kit", *argv]
    with open(tmp_path / "errors", "wb") as errors:
        if closed == "stdout from the start":
            call = ["sh", "-c", 'exec "$@" >&-', "sh", *call]
        ends = {"stdout": write, "stderr": write if closed == "stderr, too" else errors}
        done = subprocess.run(call, cwd=ROOT, timeout=120, **ends)
    os.close(write)
    said = (tmp_path / "errors").read_text()
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert "Broken pipe" not in said
    assert done.returncode == (0 if closed == "stdout from the start" else 1), said
