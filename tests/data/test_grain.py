"""A stream of the library grain is a problem's: `train(seed, start)` is its dataset from a step on."""

import jax
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.commands import train_adapter
from tests import tiny

grain = pytest.importorskip("grain")
pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_a_training_on_a_stream_of_grain_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    some = next(tiny.problem(facts={}).train(0, 0))
    rows = [jax.tree.map(lambda x, i=i: np.asarray(x)[i], some) for i in range(len(some.x))]

    def train(seed, start):
        return iter(grain.MapDataset.source(rows).seed(seed).shuffle().repeat().batch(4)[start:])

    first = [next(train(3, step)) for step in range(4)]
    for one, other in zip(first, train(3, 0), strict=False):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    problem = tiny.problem(facts={}, train=train)
    whole = train_adapter(problem, lk.LoRA(rank=2), out=tmp_path / "whole", lr=1e-2, seed=0, epochs=2,
                          steps_per_epoch=3, progress=False, targets=["up/kernel"])  # fmt: skip
    from lorax_kit.training import fit

    with monkeypatch.context() as patched:
        patched.setattr(fit, "SAVE_SECONDS", 0.0)
