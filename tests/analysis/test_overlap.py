"""Subspace overlap: closed forms, float64 numpy from the definition, and chance by simulation."""

import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.algebra import Adaptation
from lorax_kit.analysis import (
    adapter_overlaps,
    delta_directions,
    random_overlap,
    subspace_overlap,
    weight_directions,
)
from tests.draws import draw


def orthonormal(seed, d, k, draws=()):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(*draws, d, k)))[0]


def adapter(params, rank, a, b, **setting):
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=rank, alpha=rank, **setting)}), params)
    return Adaptation(plan, {"w": lk.Factors(a=jnp.asarray(a, jnp.float32), b=jnp.asarray(b, jnp.float32))})


def test_closed_forms():
    eye = np.eye(6)
    grid = subspace_overlap(eye[:, :3], eye[:, :3])
    np.testing.assert_array_equal(np.diag(grid), 1)
    np.testing.assert_array_equal(grid, 1)  # of one basis the smaller subspace is within the larger
    np.testing.assert_array_equal(subspace_overlap(eye[:, :3], eye[:, 3:]), 0)
    assert subspace_overlap(eye[:, :2], eye[:, 1:3])[1, 1] == 0.5
    turned = np.stack([eye[0] * np.cos(0.3) + eye[1] * np.sin(0.3)], axis=1)
    assert subspace_overlap(eye[:, :1], turned)[0, 0] == pytest.approx(np.cos(0.3) ** 2)


def test_the_grid_is_the_definition_at_every_i_and_j():
    one, other = orthonormal(0, 9, 3, (2,)), orthonormal(1, 9, 5, (2,))
    grid = subspace_overlap(one, other)
    assert grid.shape == (2, 3, 5)
    for s in range(2):
        for i in range(1, 4):
            for j in range(1, 6):
                expected = np.linalg.norm(one[s][:, :i].T @ other[s][:, :j], "fro") ** 2 / min(i, j)
                assert grid[s, i - 1, j - 1] == pytest.approx(expected)


def test_chance_has_the_mean_and_the_deviation_of_random_subspaces():
    one, other = orthonormal(2, 12, 3, (4000,)), orthonormal(3, 12, 5, (4000,))
    grid = subspace_overlap(one, other)
    i, j = np.arange(1, 4)[:, None], np.arange(1, 6)[None]
    mean, deviation = random_overlap(i, j, 12)
    np.testing.assert_allclose(mean, np.maximum(i, j) / 12)
    np.testing.assert_array_less(np.abs(grid.mean(axis=0) - mean), 4 * deviation / 4000**0.5)
    np.testing.assert_allclose(grid.std(axis=0), deviation, rtol=0.06)
    assert random_overlap(4, 4, 4) == (1, 0)  # all of the space


def test_overlap_of_deltas_is_that_of_their_float64_svd():
    params = {"w": draw(0, 9, 7)}
    two = adapter(params, 2, draw(1, 2, 9), draw(2, 2, 7))
    four = adapter(params, 4, draw(3, 4, 9), draw(4, 4, 7))
    dora = lk.resolve(lk.Spec({"w": lk.DoRA(rank=3, alpha=3)}), params)
    gains = Adaptation(
        dora, {"w": lk.split(params, dora, np.array([0, 0], np.uint32))[1]["w"]._replace(b=draw(5, 3, 7))}
    )
    adapters = [two, four, gains]
    spans = []
    for found in adapters:
        delta = np.asarray(lk.merge(params, found.factors, found.plan)["w"], np.float64) - np.asarray(
            params["w"], np.float64
        )
        spans.append(np.linalg.svd(delta))
    for side, pick in (("inputs", lambda u, vt: u), ("outputs", lambda u, vt: vt.T)):
        row = adapter_overlaps(adapters, params, side=side, top=3)[0]
        assert row.directions.tolist() == [2, 3, 3]
        for x, (u, _, vt) in enumerate(spans):
            for y, (other_u, _, other_vt) in enumerate(spans):
                i, j = row.directions[x], row.directions[y]
                one, other = pick(u, vt)[:, :i], pick(other_u, other_vt)[:, :j]
                expected = np.linalg.norm(one.T @ other) ** 2 / min(i, j)
                assert row.overlap[x, y] == pytest.approx(expected, abs=2e-5)
                assert row.chance[x, y] == pytest.approx(max(i, j) / len(one))
        np.testing.assert_allclose(np.diag(row.overlap), 1, atol=1e-9)


def test_overlap_with_the_base_finds_its_leading_directions():
    u, v = orthonormal(4, 8, 8), orthonormal(5, 6, 6)
    params = {"w": jnp.asarray((u[:, :6] * [9, 7, 5, 3, 2, 1]) @ v.T, jnp.float32)}
    found = adapter(params, 2, u[:, [1, 4]].T, v[:, [1, 4]].T * [[2], [1]])
    site = found.plan.sites[0]
    delta = delta_directions(site, params["w"], found.factors["w"])
    base = weight_directions(site, params["w"])
    for one, other in ((delta.inputs, base.inputs), (delta.outputs, base.outputs)):
        np.testing.assert_allclose(subspace_overlap(one, other)[0], [0, 1, 1, 1, 1, 1], atol=1e-5)
        np.testing.assert_allclose(subspace_overlap(one, other)[1], [0, 0.5, 0.5, 0.5, 1, 1], atol=1e-5)


def test_directions_of_zero_values_are_left_out():
    """They are whatever rounding makes of them: phi is nan where they would enter."""
    params = {"w": draw(0, 5, 4)}
    padded = adapter(params, 3, np.eye(3, 5), [[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    zero = adapter(params, 1, np.ones((1, 5)), np.zeros((1, 4)))
    span = delta_directions(padded.plan.sites[0], params["w"], padded.factors["w"]).inputs
    grid = subspace_overlap(span, np.eye(5)[:, :2])
    np.testing.assert_allclose(grid, [[1, 1], [1, 1], [np.nan, np.nan]], atol=1e-12)
    row = adapter_overlaps([padded, zero], params)[0]
    assert row.directions.tolist() == [2, 0]
    np.testing.assert_allclose(row.overlap, [[1, np.nan], [np.nan, np.nan]], atol=1e-12)
    np.testing.assert_allclose(row.chance, [[0.4, np.nan], [np.nan, np.nan]])


def test_stacked_matrices_have_overlaps_of_their_own():
    params = {"w": draw(0, 2, 5, 4)}
    spec = lk.Spec({"w": lk.LoRA(rank=1, alpha=1)})
    plan = lk.resolve(spec, params, lambda p, x: jnp.einsum("sbi,sio->sbo", x, p["w"]), draw(1, 2, 3, 5))
    a = np.zeros((2, 1, 2, 5))
    a[0, 0, :, 0] = 1
    a[1, 0, 0, 0] = a[1, 0, 1, 1] = 1  # the same direction in the first matrix, an orthogonal one in the second
    both = [Adaptation(plan, {"w": lk.Factors(a=jnp.asarray(x, jnp.float32), b=jnp.ones((1, 2, 4)))}) for x in a]
    row = adapter_overlaps(both, params)[0]
    np.testing.assert_allclose(row.overlap, [[[1, 1], [1, 1]], [[1, 0], [0, 1]]], atol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: subspace_overlap(np.eye(3), np.eye(4)), lk.PlanError, "not of one space"),
        (lambda: random_overlap(5, 2, 4), lk.PlanError, "^5.0 and 2.0 directions: each must lie between 1 and"),
        (lambda: adapter_overlaps([], {}), lk.AdapterError, "^there are no adapters"),
        (
            lambda: adapter_overlaps(pair(), PARAMS, side="left"),
            lk.PlanError,
            "^side is 'left'; it must be 'inputs' or",
        ),
        (lambda: adapter_overlaps(pair(), PARAMS, top=1.5), lk.PlanError, "^top is 1.5; it must be an integer"),
        (lambda: adapter_overlaps(pair(), {"w": draw(0, 2, 2)}), lk.PlanError, "^'w' has shape"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


PARAMS = {"w": np.ones((5, 4), np.float32)}


def pair():
    return [adapter(PARAMS, 1, np.ones((1, 5)), np.ones((1, 4)))] * 2
