"""A stream of the library grain is a problem's: `train(seed, start)` is its dataset from a step on."""

import importlib

import jax
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.commands import train_adapter
from tests import tiny

grain = pytest.importorskip("grain")
pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_a_training_on_a_stream_of_grain_goes_on_from_the_middle_of_an_epoch_to_the_same_bits(tmp_path, monkeypatch):
    points = tiny.points(0, 24)
    rows = [tiny.Points(x, label) for x, label in zip(*points, strict=True)]
    cut = []

    def train(seed, start):
        for number, batch in enumerate(grain.MapDataset.source(rows).seed(seed).shuffle().repeat().batch(4)[start:]):
            if cut and start + number == cut[0]:
                raise KeyboardInterrupt
            yield batch

    for one, other in zip((next(train(3, step)) for step in range(4)), train(3, 0), strict=False):
        jax.tree.map(np.testing.assert_array_equal, one, other)

    def trained(name):
        problem = tiny.problem(facts={}, train=train)
        settings = {"lr": 1e-2, "seed": 0, "epochs": 2, "steps_per_epoch": 4, "targets": ["up/kernel"]}
        done = train_adapter(problem, lk.LoRA(rank=2), out=tmp_path / name, progress=False, **settings)
        return lk.load_adapter(done["adapter"], base=tiny.params(jax.random.key(0))).factors

    whole = trained("whole")
    monkeypatch.setattr(importlib.import_module("lorax_kit.training.fit"), "SAVE_SECONDS", -1.0)  # after every step
    cut.append(6)
    with pytest.raises(KeyboardInterrupt):
        trained("cut")
    cut.clear()
    jax.tree.map(np.testing.assert_array_equal, trained("cut"), whole)
