"""Intruder dimensions: planted ones, float64 numpy from the definition, the controls' singular values and norms."""

import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.analysis import adapter_intruders, count_intruders, scale_intruders
from lorax_kit.analysis.intruders import random_matrix
from tests.draws import draw

K, N = 24, 16


def orthonormal(seed, n):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


U, V, VALUES = orthonormal(0, K)[:, :N], orthonormal(1, N), np.linspace(4, 1, N)
PARAMS = {"w": jnp.asarray((U * VALUES) @ V.T, jnp.float32)}
PLAN = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2, alpha=2)}), PARAMS)


def factors(a, b):
    return {"w": lk.Factors(a=jnp.asarray(a, jnp.float32), b=jnp.asarray(b, jnp.float32))}


def definition(w, after, side, k):
    """max |cos| of the leading k singular vectors of `after` with all of w, from two whole decompositions."""
    (u, _, vt), (new_u, _, new_vt) = (np.linalg.svd(x, full_matrices=False) for x in (w, after))
    basis, vectors = (u, new_u[:, :k]) if side == "inputs" else (vt.T, new_vt[:k].T)
    return np.max(np.abs(basis.T @ vectors), axis=0)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_similarity_is_the_definition(side):
    leaves = factors(draw(3, 2, K), draw(4, 2, N))
    row = adapter_intruders(PLAN, PARAMS, leaves, top=5, side=side, draws=2)[0]
    w = np.asarray(PARAMS["w"], np.float64)
    delta = np.asarray(leaves["w"].a, np.float64).T @ np.asarray(leaves["w"].b, np.float64)
    np.testing.assert_allclose(row.adapter, definition(w, w + delta, side, 5), atol=1e-7)
    assert row.random.shape == row.spread.shape == (2, 5)


def test_planted_intruders_are_counted():
    """A spike along one direction of W is none; one spread evenly over m of them is, for epsilon above 1/sqrt(m)."""
    for m, limit in ((1, 1.0), (4, 0.5), (16, 0.25)):
        spike = factors(*(np.stack([100 * x[:, :m].sum(axis=1), 0 * x[:, 0]]) for x in (U, V)))
        similarity = adapter_intruders(PLAN, PARAMS, spike, top=1)[0].adapter
        np.testing.assert_allclose(similarity, limit, atol=1e-3)
        if m > 1:
            assert count_intruders(similarity, [limit - 0.01, limit + 0.01]).tolist() == [0, 1]
    still = factors(np.zeros((2, K)), np.zeros((2, N)))
    row = adapter_intruders(PLAN, PARAMS, still)[0]
    for similarity in (row.adapter, row.random[0]):
        np.testing.assert_allclose(similarity, 1, atol=1e-6)
        assert count_intruders(similarity) == 0


def test_controls_keep_what_they_say():
    rng = np.random.default_rng(0)
    made = random_matrix(np.array([3.0, 0.5, 0.0]), (K, N), rng)
    np.testing.assert_allclose(np.linalg.svd(made, compute_uv=False)[:3], [3, 0.5, 0], atol=1e-12)
    mean = np.mean([random_matrix(np.ones(1), (3, 2), rng) for _ in range(4000)], axis=0)
    np.testing.assert_allclose(mean, 0, atol=4 * 6**-0.5 / 4000**0.5)  # no direction, and no sign, is preferred
    big = factors(draw(3, 2, K), 10 * draw(4, 2, N))
    row = adapter_intruders(PLAN, PARAMS, big, top=2, draws=3)[0]
    again = adapter_intruders(PLAN, PARAMS, big, top=2, draws=3)[0]
    for one, other in zip(row[1:], again[1:], strict=True):
        np.testing.assert_array_equal(one, other)
    other = adapter_intruders(PLAN, PARAMS, big, top=2, draws=3, seed=1)[0]
    assert (row.random != other.random).all()
    # Spikes of random direction intrude as the adapter's do, whose directions were drawn at random, too.
    assert count_intruders(row.adapter, 0.9) == 2
    assert count_intruders(row.random, 0.9).tolist() == [2, 2, 2]


def test_a_spread_delta_of_the_same_size_makes_fewer_intruders():
    """What the norm does in few directions it does not in all of them: W with a gap above the bulk."""
    w = np.diag(np.array([40.0, 30.0, *np.linspace(2, 1, 30)]))
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1, alpha=1, inputs=(0,))}), {"w": jnp.asarray(w, jnp.float32)})
    spike = factors(np.ones((1, 32)) / 32**0.5, 20 * np.ones((1, 32)) / 32**0.5)
    row = adapter_intruders(plan, {"w": jnp.asarray(w, jnp.float32)}, spike, top=3, draws=5)[0]
    assert count_intruders(row.adapter[:3]) == 1
    assert count_intruders(row.random[..., :3]).tolist() == [1] * 5
    assert count_intruders(row.spread[..., :2]).tolist() == [0] * 5


def test_scaled_intruders_and_controls_of_the_same_size():
    leaves = factors(draw(3, 2, K), draw(4, 2, N))
    w = np.asarray(PARAMS["w"], np.float64)
    arms = {
        name: np.asarray(p["w"], np.float64)
        for name, p in scale_intruders(PLAN, PARAMS, leaves, 0.25, epsilon=0.8, top=4).items()
    }
    np.testing.assert_array_equal(arms["adapter"], lk.merge(PARAMS, leaves, PLAN)["w"])
    after = w + np.asarray(leaves["w"].a, np.float64).T @ np.asarray(leaves["w"].b, np.float64)
    u, s, vt = np.linalg.svd(after, full_matrices=False)
    hit = np.flatnonzero(definition(w, after, "outputs", 4) < 0.8)
    assert 0 < len(hit) < 4
    change = sum(-0.75 * s[i] * np.outer(u[:, i], vt[i]) for i in hit)
    np.testing.assert_allclose(arms["intruders"], after + change, atol=2e-5)
    np.testing.assert_allclose(
        np.linalg.svd(arms["random"] - after, compute_uv=False)[: len(hit)], 0.75 * s[hit], rtol=1e-4
    )
    shrunk = arms["shrunk"] - w
    assert np.linalg.norm(shrunk) == pytest.approx(np.linalg.norm(arms["intruders"] - w), rel=1e-5)
    np.testing.assert_allclose(shrunk / np.linalg.norm(shrunk), (after - w) / np.linalg.norm(after - w), atol=1e-6)


def test_without_intruders_every_arm_is_the_adapter():
    leaves = factors(U[:, :2].T, V[:, :2].T)  # along W's own directions
    arms = scale_intruders(PLAN, PARAMS, leaves, 0.0)
    merged = lk.merge(PARAMS, leaves, PLAN)["w"]
    for params in arms.values():
        np.testing.assert_array_equal(params["w"], merged)


def test_stacked_bfloat16_matrices_are_taken_one_by_one():
    params = {"w": draw(5, 2, 12, 8).astype(jnp.bfloat16)}
    plan = lk.resolve(
        lk.Spec({"w": lk.LoRA(rank=1, alpha=1)}),
        params,
        lambda p, x: jnp.einsum("sbi,sio->sbo", x, p["w"]),
        draw(1, 2, 3, 12).astype(jnp.bfloat16),
    )
    b = draw(2, 1, 2, 8).at[:, 1].set(0)  # the second matrix is not changed
    leaves = {"w": lk.Factors(a=draw(3, 1, 2, 12), b=10 * b)}
    row = adapter_intruders(plan, params, leaves, top=3, draws=2)[0]
    assert row.adapter.shape == (2, 3)
    assert row.random.shape == row.spread.shape == (2, 2, 3)
    np.testing.assert_allclose(row.adapter[1], 1, atol=1e-9)
    w = np.asarray(params["w"], np.float64)
    delta = np.einsum("rsi,rso->sio", *(np.asarray(x, np.float64) for x in leaves["w"][:2]))
    np.testing.assert_allclose(row.adapter[0], definition(w[0], (w + delta)[0], "outputs", 3), atol=1e-9)
    arms = scale_intruders(plan, params, leaves, 0.0, epsilon=0.9, top=3)
    assert {p["w"].dtype for p in arms.values()} == {jnp.dtype(jnp.bfloat16)}
    for params in arms.values():
        np.testing.assert_array_equal(params["w"][1], jnp.asarray(w[1], jnp.bfloat16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda leaves: count_intruders(np.ones(2), 1.5), r"^epsilon is 1\.5; it is a cosine, in \(0, 1\]\.$"),
        (
            lambda leaves: adapter_intruders(PLAN, PARAMS, leaves, top=0),
            "^top is 0; it must be an integer",
        ),
        (lambda leaves: adapter_intruders(PLAN, PARAMS, leaves, draws=0), "^draws is 0; it must be an integer"),
        (lambda leaves: adapter_intruders(PLAN, PARAMS, leaves, side="u"), "^side is 'u'; it must be"),
        (lambda leaves: adapter_intruders(PLAN, PARAMS, {}), "^the factors lack 'w'"),
        (lambda leaves: scale_intruders(PLAN, PARAMS, leaves, "half"), "^scale is 'half'; it must be a number"),
        (lambda leaves: scale_intruders(PLAN, PARAMS, leaves, 0.5, epsilon=0), r"^epsilon is 0\.0; it is a cosine"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(lk.LoraxError, match=message):
        call(factors(np.ones((2, K)), np.ones((2, N))))
