"""A training that is interrupted goes on to the same bits, does no epoch twice, and refuses another training's file."""

import importlib

import jax
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.json_text import parse_json
from lorax_kit.training.saved import load_training
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")
BATCH = next(tiny.stream(0, 0))
BASE = tiny.params(jax.random.key(0))
PLAN = lk.resolve(lk.Spec({"head/bias": lk.Full(), "up/kernel": lk.LoRA(rank=2, dropout=0.5)}), BASE, tiny.apply, BATCH)
ADAPTED = lk.adapt(tiny.apply, PLAN)


PROBLEM = tiny.problem()


def loss(base, factors, batch, key):
    return PROBLEM.loss(ADAPTED(base, factors, batch, dropout_key=key), batch), {"count": jax.numpy.float32(1)}


INIT, STEP = lk.make_step(loss, lk.partition(optax.adamw(1e-2), PLAN))
EPOCHS = [[tiny.points(10 * e + s, 16) for s in range(3)] for e in range(3)]
VALUES = {3: 0.5, 6: 0.3, 9: 0.4}
"""Validation losses by step: the second epoch is the best."""


def start():
    return INIT(lk.split(BASE, PLAN, jax.random.key(1))[1], jax.random.key(2))


def run(folder, step=STEP, stop_at_evaluation=None, settings=None, epochs=EPOCHS):
    calls = []

    def evaluate(factors):
        calls.append(1)
        if len(calls) == stop_at_evaluation:
            raise KeyboardInterrupt
        return {"loss": VALUES[len(calls) * 3 + offset]}

    offset = 3 * len((folder / "log.jsonl").read_text().splitlines()) if (folder / "log.jsonl").exists() else 0
    files = {"log": folder / "log.jsonl", "saved": folder / "training.npz"}
    return lk.fit(step, start(), BASE, epochs, evaluate=evaluate, progress=False, settings=settings, **files)


def interrupted_step(after):
    taken = []

    def step(*args):
        if len(taken) == after:
            raise KeyboardInterrupt
        taken.append(1)
        return STEP(*args)

    return step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with jax.numpy_dtype_promotion("standard"):
        return run(folder), (folder / "log.jsonl").read_text()


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        ({"step": 2}, 7),
        ({"step": 4}, 5),
        ({"stop_at_evaluation": 2}, 3),
        ({"stop_at_evaluation": 3}, 0),
    ],
)
def test_going_on_equals_no_interruption(stop, left, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("lorax_kit.training.fit"), "SAVE_SECONDS", -1.0)  # after every step
    if "step" in stop:
        stop = {"step": interrupted_step(stop["step"])}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, **stop)
    taken = []
    again = run(tmp_path, step=lambda *args: (taken.append(1), STEP(*args))[1])
    assert len(taken) == left
    fitted, log = whole
    for x, y in zip(jax.tree.leaves(again.state.factors), jax.tree.leaves(fitted.state.factors), strict=True):
        np.testing.assert_array_equal(x, y)

    def rows(text):
        return [{k: v for k, v in parse_json(line).items() if k != "seconds"} for line in text.splitlines()]

    assert rows((tmp_path / "log.jsonl").read_text()) == rows(log)
    assert [row["epoch"] for row in again.history] == [1, 2, 3]
    # What ended is not trained again.
    taken.clear()
    third = run(tmp_path, step=lambda *args: taken.append(1))
    assert (taken, third.stopped, len(third.history)) == ([], "epochs", 3)


def test_a_log_cut_by_a_kill_is_completed(tmp_path):
    run(tmp_path)
    log = (tmp_path / "log.jsonl").read_text()
    for cut in (log[:-10], "".join(log.splitlines(keepends=True)[:2])):
        (tmp_path / "log.jsonl").write_text(cut)
        run(tmp_path)
        assert (tmp_path / "log.jsonl").read_text() == log


def test_of_settings_within_settings_the_innermost_that_differs_is_named(tmp_path):
    def settings(val=0.1, digest="a"):
        problem = {"data": "x" * 200, "val": val, "sha256": {"data": digest}}
        return {"lr": 0.1, "problem": {key: x for key, x in problem.items() if x is not None}}

    run(tmp_path, settings=settings())
    with pytest.raises(lk.LoraxError, match=r"of other settings: problem, sha256, data was 'a', and is 'b'\.\n"):
        run(tmp_path, settings=settings(digest="b"))
    with pytest.raises(lk.LoraxError, match=r"of other settings: problem, val was 0\.1, and is left out\."):
        run(tmp_path, settings=settings(val=None))


def test_another_training_and_a_damaged_file_are_refused(tmp_path):
    run(tmp_path, settings={"lr": 0.1})
    with pytest.raises(lk.LoraxError, match=r"of other settings: lr was 0\.1, and is 0\.2"):
        run(tmp_path, settings={"lr": 0.2})
    with pytest.raises(lk.LoraxError, match="of other settings: epochs was 3, and is 2"):
        run(tmp_path, settings={"lr": 0.1}, epochs=EPOCHS[:2])
    file = tmp_path / "training.npz"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(lk.LoraxError, match=r"is damaged: .*\n  delete it: training then begins anew"):
        run(tmp_path, settings={"lr": 0.1})


def kept_settings(file):
    with np.load(file) as stored:
        return parse_json(str(stored["facts"]))["settings"]


def test_no_flipped_bit_of_the_archive_is_told_otherwise(tmp_path):
    """Of its headers and its table of contents: zipfile raises many kinds of errors."""
    run(tmp_path)
    file, settings = tmp_path / "training.npz", kept_settings(tmp_path / "training.npz")
    whole = file.read_bytes()
    damaged, begun = 0, start()
    for place in [*range(40), *range(whole.index(b"PK\x01\x02"), len(whole))][::3]:
        for bit in range(8):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            try:
                load_training(file, begun, settings)
            except lk.LoraxError:
                damaged += 1
    assert damaged > 300


def test_factors_of_another_dtype_are_another_training(tmp_path):
    run(tmp_path)
    file, begun = tmp_path / "training.npz", start()
    half = begun._replace(factors=jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), begun.factors))
    with pytest.raises(lk.LoraxError, match="is of another training: its arrays do not fit"):
        load_training(file, half, kept_settings(file))
