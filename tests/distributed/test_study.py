"""Real processes of `jax.distributed` on one study: in each the rows of one process; a killed one loses nothing."""

import json
import random
import subprocess
import sys
import time

import jax
import pytest

import lorax_kit as lk
from lorax_kit.parallel import join
from tests import tiny
from tests.distributed.processes import ROOT, ended, environment, free_port

pytestmark = pytest.mark.distributed


def together(count, out, limit=240):
    """(return codes, rows of each, stderrs) of `count` processes of two devices each."""
    port = free_port()
    argv = [sys.executable, str(ROOT / "tests/distributed/study_member.py")]
    procs = [
        subprocess.Popen(
            [*argv, str(i), str(count), str(port), str(out)], env=environment(2), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(count)
    ]  # fmt: skip
    codes, outputs, errors = ended(procs, limit)
    rows = [
        next((json.loads(line[5:]) for line in text.splitlines() if line.startswith("ROWS ")), None) for text in outputs
    ]
    return codes, rows, errors


def measured(row):
    return {k: v for k, v in row.items() if isinstance(v, float) and k.startswith(("train_l", "val_", "test_"))}


def test_two_processes_have_the_rows_of_one(tmp_path, standard_promotion):
    alone = lk.run(tiny.study(steps=24, eval_every=6), tiny.problem(), out=tmp_path / "alone", progress=False)
    codes, rows, errors = together(2, tmp_path / "two")
    assert codes == [0, 0], errors
    assert rows[0] == rows[1]
    for ours, theirs in zip(rows[0], alone.rows, strict=True):
        assert ours["trial"] == theirs["trial"]
        assert measured(ours) == pytest.approx(measured(theirs), abs=1e-5)
        base = tiny.params(jax.random.key(0))
        assert lk.load_adapter(tmp_path / "two" / ours["adapter"], base=base).plan.full
    info = json.loads((tmp_path / "two" / "study.json").read_text())
    grads = 8 // 2 * sum(x.size * 4 for x in jax.tree.leaves(lk.load_adapter(
        tmp_path / "two" / rows[0][5]["adapter"], base=tiny.params(jax.random.key(0))).factors))  # fmt: skip
    assert info["groups"][0]["collective_bytes"] <= 1.1 * grads


DESIGN = {"rank": [1, 2], "alpha": 8, "lr": 1e-2, "seed": [0, 1], "targets": tiny.TARGETS, "steps": 1500}


def commands(folder, out, count=2):
    """Processes of one `lorax-kit study`, that keep every step."""
    config = folder / "config.json"
    config.write_text(json.dumps({"problem": {"address": "tests.tiny:built", "rows": 48}, "study": DESIGN}))
    where = [] if count == 1 else ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(count)]
    argv = [sys.executable, "-c", KEEPS_EVERY_STEP, "study", "--config", str(config), "--out", str(out), *where]
    return [
        subprocess.Popen(
            [*argv, *(["--process", str(i)] if where else [])],
            env=environment(2), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(count)
    ]  # fmt: skip


KEEPS_EVERY_STEP = """
from lorax_kit.cli import main
from lorax_kit.study.programs import engine
engine.SAVE_SECONDS = 0.0
main()
"""


def test_a_study_of_two_processes_is_killed_at_random_moments_and_goes_on_to_the_same_bits(tmp_path):
    draw, killed = random.Random(0), tmp_path / "killed"
    kept, seen = killed / "training.npz", 0
    for victim in (1, 0):
        procs = commands(tmp_path, killed)
        while (not kept.exists() or kept.stat().st_mtime_ns == seen) and all(proc.poll() is None for proc in procs):
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1.5))
        procs[victim].kill()
        began = time.monotonic()
        codes, _, errors = ended(procs, limit=100)
        if codes[victim] == 0:  # it had finished
            break
        assert codes[victim] == -9
        other = errors[1 - victim]
        assert codes[1 - victim] not in (0, None), other
        if victim == 1:  # where the leader is lost, JAX itself may end the others first, and says so
            assert codes[0] == 75, other
            assert "lorax-kit: another process of this program ended" in other
            assert "Traceback" not in other
        else:
            assert "another process of this program ended" in other or "leader task was preempted/died" in other
        print(f"killed process {victim}: the other ended after {time.monotonic() - began:.1f} s with {codes}")
        seen = kept.stat().st_mtime_ns
    codes, _, errors = ended(commands(tmp_path, killed))
    assert codes == [0, 0], errors
    codes, _, errors = ended(commands(tmp_path, tmp_path / "whole"))
    assert codes == [0, 0], errors
    rows = [[json.loads(x) for x in (out / "trials.jsonl").open()] for out in (killed, tmp_path / "whole")]
    assert [measured(row) for row in rows[0]] == [measured(row) for row in rows[1]]
    assert len(rows[0]) == 4
    assert not [p.name for p in killed.iterdir() if "staging" in p.name or p.name == "training.npz"]


def test_the_command_runs_in_two_processes_and_one_of_them_prints(tmp_path):
    design = {"rank": [1, 2], "alpha": 8, "lr": 1e-2, "seed": [0, 1], "targets": tiny.TARGETS, "steps": 4}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"problem": {"address": "tests.tiny:built", "rows": 48}, "study": design}))
    env = environment(2)
    argv = [sys.executable, "-m", "lorax_kit", "study", "--config", str(config), "--json"]
    alone = subprocess.run([*argv, "--out", str(tmp_path / "alone")], env=env, text=True, capture_output=True)
    assert alone.returncode == 0, alone.stderr
    several = [*argv, "--out", str(tmp_path / "run"), "--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2"]
    procs = [
        subprocess.Popen([*several, "--process", str(i)], env=env, text=True, stdout=-1, stderr=-1) for i in (0, 1)
    ]
    outputs = [proc.communicate(timeout=240) for proc in procs]
    assert [proc.returncode for proc in procs] == [0, 0], outputs
    assert outputs[1][0] == ""
    for ours, theirs in zip(json.loads(outputs[0][0])["rows"], json.loads(alone.stdout)["rows"], strict=True):
        assert measured(ours) == pytest.approx(measured(theirs), abs=1e-5)
    assert (tmp_path / "run" / "report.html").exists()


def test_half_an_address_is_an_error():
    with pytest.raises(lk.LoraxError, match="go together"):
        join("127.0.0.1:9", 2)
