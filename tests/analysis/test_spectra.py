import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_kit.analysis import delta_spectrum, effective_rank, rank_for_energy


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense_spectrum(a, b, scale, k):
    """numpy float64 SVD of the whole product."""
    a64 = a.reshape(a.shape[0], -1).astype(np.float64)
    b64 = b.reshape(b.shape[0], -1).astype(np.float64)
    return np.linalg.svd(scale * a64.T @ b64, compute_uv=False)[:k]


@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [((4, 30), (4, 20)), ((1, 30), (1, 20)), ((3, 5, 6), (3, 2, 7)), ((8, 3), (8, 20)), ((4, 4), (4, 4))],
)
def test_spectrum_equals_svd_of_the_dense_product(a_shape, b_shape):
    a, b = draw(0, *a_shape), draw(1, *b_shape)
    s = delta_spectrum(a, b, -1.5)
    k = min(a_shape[0], np.prod(a_shape[1:]), np.prod(b_shape[1:]))
    assert s.shape == (k,)
    expected = dense_spectrum(a, b, -1.5, k)
    np.testing.assert_allclose(s, expected, rtol=2e-5, atol=2e-6 * expected[0])


def test_stacked_layers_equal_one_at_a_time():
    a, b, scale = draw(0, 4, 3, 10, 2), draw(1, 4, 3, 12), np.array([0.5, 1.0, 2.0], np.float32)
    stacked = jax.jit(delta_spectrum, static_argnames="batch_axes")(a, b, scale, batch_axes=1)
    assert stacked.shape == (3, 4)
    for layer in range(3):
        expected = dense_spectrum(a[:, layer], b[:, layer], scale[layer], 4)
        np.testing.assert_allclose(stacked[layer], expected, rtol=2e-5)
    two_axes = delta_spectrum(a.reshape(4, 3, 1, 20), b.reshape(4, 3, 1, 12), 2.0, batch_axes=2)
    np.testing.assert_allclose(two_axes[:, 0], stacked / scale[:, None] * 2.0, rtol=1e-5)


def test_vmap_over_trials_equals_a_loop():
    a, b = draw(0, 5, 2, 9), draw(1, 5, 2, 8)
    mapped = jax.vmap(delta_spectrum)(a, b, jnp.arange(5.0))
    for trial in range(5):
        np.testing.assert_allclose(mapped[trial], dense_spectrum(a[trial], b[trial], trial, 2), rtol=2e-5, atol=1e-6)


def test_zero_rows_add_zero_singular_values():
    """A rank-2 trial stored as a rank-5 one has the same spectrum."""
    a, b = draw(0, 2, 9), draw(1, 2, 8)
    padded = delta_spectrum(np.pad(a, ((0, 3), (0, 0))), np.pad(b, ((0, 3), (0, 0))), 1.0)
    np.testing.assert_allclose(padded[:2], delta_spectrum(a, b, 1.0), rtol=1e-5)
    np.testing.assert_allclose(padded[2:], 0, atol=1e-6)
    assert effective_rank(padded) == pytest.approx(float(effective_rank(delta_spectrum(a, b))), rel=1e-4)


def test_zero_delta_gives_zeros_not_nan():
    s = delta_spectrum(draw(0, 3, 7), np.zeros((3, 6), np.float32), 4.0)
    np.testing.assert_array_equal(s, np.zeros(3))
    assert float(effective_rank(s)) == 0.0
    assert int(rank_for_energy(s)) == 0


def test_bfloat16_factors_are_widened():
    a, b = jnp.asarray(draw(0, 3, 7), jnp.bfloat16), jnp.asarray(draw(1, 3, 6), jnp.bfloat16)
    s = delta_spectrum(a, b, 1.0)
    assert s.dtype == jnp.float32
    np.testing.assert_allclose(s, dense_spectrum(np.float32(a), np.float32(b), 1.0, 3), rtol=2e-5)


def test_strict_promotion_is_enough():
    a, b = jnp.asarray(draw(0, 3, 2, 7), jnp.bfloat16), jnp.asarray(draw(1, 3, 2, 6))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        s = delta_spectrum(a, b, jnp.float32(2.0), batch_axes=1)
        assert effective_rank(s).shape == rank_for_energy(s, 0.5).shape == (2,)


@pytest.mark.parametrize(
    ("a_shape", "b_shape", "batch_axes"), [((2, 5), (3, 5), 0), ((2, 3, 5), (2, 4, 5), 1), ((2,), (2,), 1)]
)
def test_mismatched_factors_are_an_error(a_shape, b_shape, batch_axes):
    with pytest.raises(ValueError, match="must share their first"):
        delta_spectrum(np.ones(a_shape), np.ones(b_shape), batch_axes=batch_axes)


def test_effective_rank_closed_forms():
    assert float(effective_rank(jnp.full(7, 0.3))) == pytest.approx(7, rel=1e-6)
    assert float(effective_rank(jnp.array([5.0, 0.0, 0.0]))) == pytest.approx(1, rel=1e-6)
    # Shares 3/4 and 1/4: exp(H) = 4 / 3^(3/4).
    assert float(effective_rank(jnp.array([1.0, 3.0]))) == pytest.approx(4 / 3**0.75, rel=1e-6)
    # It does not depend on the scale of the delta.
    assert float(effective_rank(jnp.array([1e-6, 3e-6]))) == pytest.approx(4 / 3**0.75, rel=1e-5)


def test_rank_for_energy_counts_squared_values():
    s = jnp.array([[3.0, 1.0, 0.5], [1.0, 1.0, 1.0], [0.0, 2.0, 0.0], [1e-25, 1e-25, 0.0]])
    assert rank_for_energy(s, 0.9).tolist() == [2, 3, 1, 2]
    assert rank_for_energy(s, 0.5).tolist() == [1, 2, 1, 1]
    assert rank_for_energy(s, 1.0).tolist() == [3, 3, 1, 2]
    with pytest.raises(ValueError, match="share in"):
        rank_for_energy(s, 90)
