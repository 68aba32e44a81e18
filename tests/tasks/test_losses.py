"""Classification metrics against numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_kit.tasks import correct, cross_entropies, cross_entropy

LOGITS = 5 * np.random.default_rng(0).normal(size=(9, 4))
LABEL = np.arange(9, dtype=np.int32) % 4
WEIGHT = np.array([1, 1, 0, 1, 0.5, 1, 0, 2, 1], np.float32)


def reference():
    exact = LOGITS.astype(np.float32).astype(np.float64)
    top = exact.max(-1, keepdims=True)
    logp = exact - top - np.log(np.exp(exact - top).sum(-1, keepdims=True))
    return -logp[np.arange(9), LABEL]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_losses_and_counts_equal_float64(wrap):
    logits = jnp.asarray(LOGITS, jnp.float32)
    np.testing.assert_allclose(wrap(cross_entropies)(logits, LABEL), reference(), rtol=1e-5, atol=1e-6)
    mean = np.sum(reference() * WEIGHT) / WEIGHT.sum(dtype=np.float64)
    np.testing.assert_allclose(wrap(cross_entropy)(logits, LABEL, WEIGHT), mean, rtol=1e-6)
    assert float(wrap(correct)(logits, LABEL, WEIGHT)) == np.sum((LOGITS.argmax(-1) == LABEL) * WEIGHT)


def test_extreme_logits_stay_finite():
    logits = jnp.array([[1e4, -1e4], [-1e4, 1e4]], jnp.float32)
    np.testing.assert_array_equal(cross_entropies(logits, jnp.array([0, 0])), [0, 2e4])


def test_bfloat16_logits_give_fp32_losses():
    losses = cross_entropies(jnp.asarray(LOGITS, jnp.bfloat16), LABEL)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, reference(), atol=0.1)


def test_a_batch_that_weighs_nothing_costs_nothing():
    logits = jnp.asarray(LOGITS, jnp.float32)
    assert float(cross_entropy(logits, LABEL, np.zeros(9, np.float32))) == 0
    assert float(correct(logits, LABEL, np.zeros(9, np.float32))) == 0
