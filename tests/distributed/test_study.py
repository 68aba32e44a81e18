"""Real processes of `jax.distributed` on one study: in each the rows of one process; a killed one loses nothing."""

import json
import subprocess
import sys
import time

import jax
import pytest

import lorax_kit as lk
from lorax_kit.parallel import join
from tests import tiny
from tests.distributed.processes import ROOT, environment, free_port

pytestmark = pytest.mark.distributed


def together(count, out, dies=0, limit=240):
    """(return codes, rows of each) of `count` processes of two devices each."""
    env = environment(2)
    port = free_port()
    argv = [sys.executable, str(ROOT / "tests/distributed/study_member.py")]
    procs = [
        subprocess.Popen(
            [*argv, str(i), str(count), str(port), str(out), str(dies)], env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(count)
    ]  # fmt: skip
    ended = time.monotonic() + limit
    if dies:
        procs[-1].wait(timeout=limit)
        for proc in procs[:-1]:  # they wait for the dead one: the scheduler ends them
            time.sleep(1)
            proc.kill()
    outputs = [proc.communicate(timeout=max(ended - time.monotonic(), 1)) for proc in procs]
    rows = [
        next((json.loads(line[5:]) for line in text.splitlines() if line.startswith("ROWS ")), None)
        for text, _ in outputs
    ]
    return [proc.returncode for proc in procs], rows, [error for _, error in outputs]


def measured(row):
    return {k: v for k, v in row.items() if isinstance(v, float) and k.startswith(("train_l", "val_", "test_"))}


def test_two_processes_have_the_rows_of_one_and_a_killed_one_loses_nothing(tmp_path, standard_promotion):
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
    codes, rows, _ = together(2, tmp_path / "killed", dies=15)
    assert codes[1] == 9
    assert (tmp_path / "killed" / "training.npz").exists()
    codes, rows, errors = together(2, tmp_path / "killed")
    assert codes == [0, 0], errors
    two = (tmp_path / "two" / "trials.jsonl").read_text().splitlines()
    again = (tmp_path / "killed" / "trials.jsonl").read_text().splitlines()
    assert [measured(json.loads(x)) for x in again] == [measured(json.loads(x)) for x in two]


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
