"""What trackers are told, and what TensorBoard and Weights & Biases write of it (with the real libraries: interop)."""

import json

import jax
import pytest

import lorax_kit as lk
from lorax_kit.study.trackers import tensorboard, wandb
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")


def run(out, *trackers, **changes):
    study = tiny.study(**{"rank": [1, 2], "seed": [0], "steps": 6, "eval_every": 3, "probe_lr": ()} | changes)
    return lk.run(study, tiny.problem(), out=out, progress=False, trackers=trackers)


def test_a_function_is_told_every_step_validation_and_row(tmp_path):
    told = []
    results = run(tmp_path / "run", told.append)
    curves = [json.loads(line) for line in (results.path / "curves.jsonl").read_text().splitlines()]
    steps = {(trial, e["step"]): loss for e in told if e["event"] == "step" for trial, loss in e["losses"].items()}
    assert steps == {(c["trial"], c["step"]): c["loss"] for c in curves}
    found = {(t, e["step"]): m["accuracy"] for e in told if e["event"] == "validation" for t, m in e["metrics"].items()}
    assert found == {(c["trial"], c["step"]): c["val_accuracy"] for c in curves if "val_accuracy" in c}
    assert [e["row"] for e in told if e["event"] == "trial"] == results.rows


def test_a_tracker_that_raises_is_named_and_the_study_goes_on_without_it(tmp_path):
    def board(event):
        if event["event"] == "step" and event["step"] == 3:
            raise ConnectionError("no route to the board")

    study = tiny.study()
    with pytest.raises(lk.StudyError, match="tracker 'board' fails at a 'step' event: ConnectionError: no route"):
        lk.run(study, tiny.problem(), out=tmp_path / "run", progress=False, trackers=[board])
    whole, again = (lk.run(study, tiny.problem(), out=tmp_path / name, progress=False) for name in ("whole", "run"))
    assert [row["test_loss"] for row in again.rows] == [row["test_loss"] for row in whole.rows]


def test_stopped_trials_are_told_of_too(tmp_path):
    told = []
    run(tmp_path / "run", told.append, lr=[1e-3, 1e-2, 3e-2], stop=lk.Halving(first=2))
    rows = [e["row"] for e in told if e["event"] == "trial"]
    assert {row["status"] for row in rows} == {"done", "stopped"}
    assert len(rows) == 6


@pytest.mark.interop
def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = run(tmp_path / "run", tensorboard(tmp_path / "board"))
    for row in results.rows:
        board = EventAccumulator(str(tmp_path / "board" / row["trial"]))
        board.Reload()
        tags = {tag: [e.tensor_proto.float_val[0] for e in board.Tensors(tag)] for tag in board.Tags()["tensors"]}
        assert len(tags["train/loss"]) == 6
        assert len(tags["val/accuracy"]) == 2
        assert tags["final/test_loss"] == [pytest.approx(row["test_loss"])]


@pytest.mark.interop
def test_wandb_keeps_offline_runs(tmp_path):
    pytest.importorskip("wandb")
    results = run(tmp_path / "run", wandb("lorax", tmp_path / "offline"))
    files = list((tmp_path / "offline").rglob("*.wandb"))
    assert len(files) == len(results.rows)
    assert all(file.stat().st_size > 200 for file in files)
    assert jax.tree.leaves(results.rows)
