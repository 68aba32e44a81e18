"""DoRA: norms that keep their digits, a start that changes no bit in any program, and what is formed for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.methods import dora
from tests.draws import draw
from tests.methods import promises

STACKED = {"a": 1, "b": 1, "magnitude": 0}


def formula(w, leaves, scale):
    v = w + scale * leaves["a"].T @ leaves["b"]
    return leaves["magnitude"].ravel() * v / np.linalg.norm(v, axis=0)


@pytest.mark.parametrize("block", [2**20, 16])  # the sum formed at once, and for two or more inputs at a time
def test_the_update_is_the_papers(block, monkeypatch):
    monkeypatch.setattr(dora, "BLOCK", block)
    monkeypatch.setattr(dora, "TABLE", block)
    promises.check_formula(lk.DoRA(rank=3, alpha=6), formula, STACKED)


@pytest.mark.parametrize("left", [1e-3, 1e-4, 1e-5])
def test_an_update_that_takes_most_of_a_column_away(left):
    """The column's direction is W's own, and its length the magnitude, whatever is left of it."""
    w = draw(0, 64, 8)
    plan = lk.resolve(lk.Spec({"w": lk.DoRA(rank=1)}), {"w": w})
    base, factors = lk.split({"w": w}, plan, jax.random.key(0))
    taken = factors["w"]._replace(a=w[:, 0][None], b=jnp.zeros((1, 8)).at[0, 0].set(left - 1))
    merged = jax.jit(lambda f: lk.merge(base, f, plan))({"w": taken})["w"]
    np.testing.assert_allclose(merged, w, rtol=2e-7 / left, atol=1e-6)
    assert float(jnp.linalg.norm(merged[:, 0])) == pytest.approx(float(taken.magnitude[0]), rel=1e-6)


@pytest.mark.parametrize("start", ["kaiming", "pissa"])
@pytest.mark.parametrize(
    ("equation", "shape", "inputs"),
    [
        ("btd,dhk->bthk", (32, 2, 16), (2, 5, 32)),
        ("bthk,hkd->btd", (2, 16, 32), (2, 5, 2, 16)),
        ("etd,edh->eth", (3, 64, 64), (3, 5, 64)),
    ],
)
def test_the_start_changes_no_bit_in_or_out_of_jit(equation, shape, inputs, start):
    params, x = {"w": draw(0, *shape)}, draw(1, *inputs)

    def fn(p, x):
        return jnp.einsum(equation, x, p["w"])

    plan = lk.resolve(lk.Spec({"w": lk.DoRA(rank=2, start=start)}), params, fn, x)
    base, factors = lk.split(params, plan, jax.random.key(0))
    for merge in (lk.merge, jax.jit(lk.merge, static_argnums=2)):
        np.testing.assert_array_equal(merge(base, factors, plan)["w"], params["w"])
    np.testing.assert_array_equal(jax.jit(lk.adapt(fn, plan))(base, factors, x), jax.jit(fn)(params, x))


def test_a_magnitude_is_trained_from_the_start():
    params, x = {"w": draw(0, 6, 4)}, draw(1, 3, 6)
    plan = lk.resolve(lk.Spec({"w": lk.DoRA(rank=1)}), params)
    base, factors = lk.split(params, plan, jax.random.key(0))
    adapted = lk.adapt(lambda p, x: x @ p["w"], plan)
    found = jax.grad(lambda f: jnp.sum(adapted(base, f, x)))(factors)["w"].magnitude
    np.testing.assert_allclose(found, (x @ params["w"]).sum(0) / factors["w"].magnitude, rtol=1e-5)
