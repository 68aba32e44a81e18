"""Random starts: the same numbers wherever they are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.starts.draws import draw_rows


@pytest.mark.parametrize("start", ["normal", "kaiming"])
def test_a_start_is_the_same_under_jit(start):
    params, fn = {"w": jnp.ones((33, 64))}, lambda p, x: x @ p["w"]
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=8, start=start)}), params, fn, jnp.ones((2, 33)))
    drawn = lambda key: lk.split(params, plan, key)[1]["w"].a  # noqa: E731
    np.testing.assert_array_equal(drawn(jax.random.key(0)), jax.jit(drawn)(jax.random.key(0)))


@pytest.mark.parametrize("uniform", [False, True])
def test_rows_of_a_larger_draw_are_those_of_a_smaller(uniform):
    key = jax.random.key(0)
    rows = draw_rows(key, (5, 3, 4), 0.1, uniform=uniform)
    np.testing.assert_array_equal(draw_rows(key, (2, 3, 4), 0.1, uniform=uniform), rows[:2])
