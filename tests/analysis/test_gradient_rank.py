"""Spectra of full-weight gradients: closed forms, float64 numpy, stacked sites, and a training that is watched."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.analysis import at_steps, gradient_spectra
from tests.draws import draw, moved_leaves


def squares(p, batch):
    x, y = batch
    return jnp.sum((x @ p["w"] - y) ** 2) / 2


def test_gradients_are_those_of_the_merged_weight():
    """dL/dW' = X^T (X W' - Y), at W' of DoRA: gains included."""
    params, x, y = {"w": draw(0, 6, 4)}, draw(1, 5, 6), draw(2, 5, 4)
    plan = lk.resolve(lk.Spec({"w": lk.DoRA(rank=2)}), params)
    base, start = lk.split(params, plan, jax.random.key(0))
    factors = moved_leaves(plan, start)
    row = gradient_spectra(squares, plan, base)(factors, (x, y))[0]
    merged = np.asarray(lk.merge(base, factors, plan)["w"], np.float64)
    x64 = np.asarray(x, np.float64)
    expected = np.linalg.svd(x64.T @ (x64 @ merged - np.asarray(y, np.float64)), compute_uv=False)
    np.testing.assert_allclose(row.singular_values, expected, rtol=2e-5)
    share = expected / expected.sum()
    assert row.effective_rank == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-4)
    held = np.cumsum(expected**2) / np.sum(expected**2)
    assert row.rank_for_energy == 1 + np.count_nonzero(held < 0.9)


def test_rank_is_that_of_the_batch():
    """n inputs give a gradient of rank n; equal and orthogonal ones, n equal singular values; no loss, none."""
    params = {"w": jnp.zeros((6, 5))}
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params)
    factors = lk.split(params, plan, jax.random.key(0))[1]
    measure = gradient_spectra(squares, plan, params, energy=0.5)
    row = measure(factors, (jnp.eye(3, 6), jnp.eye(3, 5)))[0]
    np.testing.assert_allclose(row.singular_values, [1, 1, 1, 0, 0], atol=1e-7)
    assert row.effective_rank == pytest.approx(3, rel=1e-6)
    assert row.rank_for_energy == 2
    none = measure(factors, (jnp.eye(3, 6), jnp.zeros((3, 5))))[0]
    assert (none.effective_rank, none.rank_for_energy) == (0, 0)


def test_stacked_quantised_and_full_parameters():
    params = {"w": draw(0, 2, 6, 6), "v": draw(1, 6, 4), "bias": draw(2, 4)}
    base = lk.quantize(params, ["v"], "int8", block=2)

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0] @ p["v"] + p["bias"][None]

    def loss(p, x):
        return jnp.sum(fn(p, x) ** 2)

    plan = lk.resolve(lk.Spec({"{w,v}": lk.LoRA(rank=2), "bias": lk.Full()}), base, fn, draw(3, 3, 6))
    _, start = lk.split(base, plan, jax.random.key(0))
    factors = moved_leaves(plan, start)
    x = draw(4, 3, 6)
    rows = {row.path: row for row in gradient_spectra(loss, plan, base)(factors, x)}
    assert {path: row.singular_values.shape for path, row in rows.items()} == {"w": (2, 6), "v": (4,)}
    slopes = jax.grad(loss)(lk.merge(base, factors, plan), x)
    for path, row in rows.items():
        expected = np.linalg.svd(np.asarray(slopes[path], np.float64), compute_uv=False)
        np.testing.assert_allclose(row.singular_values, expected, rtol=1e-4, atol=1e-6 * expected.max())
        assert row.effective_rank.shape == expected.shape[:-1]


def test_a_training_is_measured_at_chosen_steps(standard_promotion):
    params, x, y = {"w": draw(0, 6, 4)}, draw(1, 5, 6), draw(2, 5, 4)
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params)
    base, factors = lk.split(params, plan, jax.random.key(0))
    adapted = lk.adapt(lambda p, batch: batch[0] @ p["w"], plan)
    tx = lk.partition(optax.sgd(1e-2), plan)
    init, step = lk.make_step(lambda base, f, batch: jnp.sum((adapted(base, f, batch) - batch[1]) ** 2) / 2, tx)
    measure = gradient_spectra(squares, plan, base)
    watched, found = at_steps(step, measure, [0, 2])
    state = init(factors)
    seen = []
    for _ in range(4):
        seen.append(jax.tree.map(jnp.array, state.factors))
        state, info = watched(state, base, (x, y))
    assert int(state.step) == 4
    assert bool(info.finite)
    assert sorted(found) == [0, 2]
    for number, rows in found.items():
        np.testing.assert_array_equal(rows[0].singular_values, measure(seen[number], (x, y))[0].singular_values)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"energy": 0}, ValueError, r"^energy is a share in \(0, 1\], got 0\.$"),
        ({"base": {"v": jnp.ones((6, 5))}}, lk.PlanError, "^the plan adapts 'w', which these params do not have"),
        ({"factors": {}}, lk.AdapterError, "^the factors lack 'w'"),
        (
            {"batch": (jnp.full((3, 6), jnp.nan), jnp.ones((3, 5)))},
            lk.AdapterError,
            "^the gradient at 'w' is not finite",
        ),
    ],
)
def test_bad_input_is_refused(change, error, message):
    params = {"w": jnp.ones((6, 5))}
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params)
    start = lk.split(params, plan, jax.random.key(0))[1]
    given = {"base": params, "factors": start, "batch": (jnp.eye(3, 6), jnp.eye(3, 5)), "energy": 0.9} | change
    with pytest.raises(error, match=message):
        gradient_spectra(squares, plan, given["base"], energy=given["energy"])(given["factors"], given["batch"])
