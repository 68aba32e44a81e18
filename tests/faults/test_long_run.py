"""Ten thousand steps: memory does not grow, and a training that was cut in the middle ends with the same bits."""

import gc
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.measure import held_memory
from tests import tiny

STEPS, SETTLED, CUT = 10_000, 2_000, 6_123


class Cut(Exception):
    pass


class Batches:
    """An epoch that always begins by itself; notes the memory held, and may be cut at a step."""

    def __init__(self, held, cut=None):
        self.some, self.held, self.cut = list(itertools.islice(tiny.stream(0, 0), 64)), held, cut

    def __len__(self):
        return STEPS

    def __iter__(self):
        for i in range(STEPS):
            if i in (SETTLED, STEPS - 1):
                gc.collect()
                self.held.append(held_memory())
            if i == self.cut:
                raise Cut
            yield self.some[i % 64]


def trained(saved, cut=None):
    params = tiny.params(jax.random.key(0))
    plan = lk.resolve(
        lk.Spec({"{up,down}/kernel": lk.LoRA(rank=2, dropout=0.1)}), params, tiny.apply, tiny.points(0, 4)
    )
    base, factors = lk.split(params, plan, jax.random.key(1))
    run = lk.adapt(tiny.apply, plan)

    def loss(base, f, batch, key):
        return jnp.mean(tiny.losses(run(base, f, batch, dropout_key=key), batch))

    init, step = lk.make_step(loss, lk.partition(optax.adamw(1e-3), plan))
    held = []
    fitted = lk.fit(step, init(factors, jax.random.key(2)), base, [Batches(held, cut)], saved=saved, progress=False)
    return fitted.state, held


def test_ten_thousand_steps_hold_no_more_and_resume_to_the_same_bits(tmp_path, monkeypatch):
    whole, held = trained(tmp_path / "whole.npz")
    if None not in held:
        assert held[1] <= 1.01 * held[0], held
    monkeypatch.setattr(sys.modules["lorax_kit.training.fit"], "SAVE_SECONDS", 0.5)
    with pytest.raises(Cut):
        trained(tmp_path / "cut.npz", CUT)
    assert (tmp_path / "cut.npz").exists()
    resumed, _ = trained(tmp_path / "cut.npz")
    assert int(resumed.step) == int(whole.step) == STEPS
    for x, y in zip(jax.tree.leaves(resumed.factors), jax.tree.leaves(whole.factors), strict=True):
        np.testing.assert_array_equal(x, y)
