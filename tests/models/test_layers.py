"""Layers whose derivatives are written out equal the textbook form under autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_kit.models.layers import attention, gelu, gelu_tanh
from tests.draws import draw

B, H, T, S, K = 2, 3, 5, 7, 4
Q, KEY, V = (draw(i, B, H, n, K) for i, n in enumerate((T, S, S)))
SEEN = {
    "all": jnp.ones((B, 1, 1, S), bool),
    "padding": jnp.arange(S)[None, None, None] < jnp.array([7, 3])[:, None, None, None],
    "causal": jnp.arange(S)[None, None, None] <= jnp.arange(T)[None, None, :, None] + jnp.zeros((B, 1, 1, 1), int),
    "one row sees nothing": jnp.arange(B)[:, None, None, None] > jnp.zeros((1, 1, 1, S), int),
}


def textbook(q, k, v, seen, bias=0.0, scale=K**-0.5):
    scores = scale * jnp.einsum("bhtk,bhsk->bhts", q, k) + bias
    return jnp.einsum("bhts,bhsk->bhtk", jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1), v)


@pytest.mark.parametrize("seen", SEEN)
def test_attention_and_its_gradients(seen):
    found = [
        jax.jit(jax.value_and_grad(lambda *qkv, fn=fn: jnp.sum(jnp.sin(fn(*qkv, SEEN[seen]))), (0, 1, 2)))(Q, KEY, V)
        for fn in (attention, textbook)
    ]
    for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("batch", [1, B])
def test_attention_with_a_bias_and_no_scale_and_their_gradients(seen, batch):
    bias = draw(7, batch, H, T, S)
    ways = [
        lambda q, k, v, bias: attention(q, k, v, SEEN[seen], bias=bias, scale=1.0),
        lambda q, k, v, bias: attention(q, k, v, SEEN[seen], plain=True, bias=bias, scale=1.0),
        lambda q, k, v, bias: textbook(q, k, v, SEEN[seen], bias, 1.0),
    ]

    def summed(fn):
        return jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(fn(*x))), (0, 1, 2, 3))

    ours, plain, expected = jax.jit(lambda *x: [summed(fn)(*x) for fn in ways])(Q, KEY, V, bias)
    assert jnp.abs(expected[1][3]).max() > 0.1
    for found in (ours, plain):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=4e-6), found, expected)


def test_attention_twice_differentiated_and_batched():
    def curvature(fn):
        norm = lambda q: jnp.sum(jax.grad(lambda q: jnp.sum(fn(q, KEY, V, SEEN["padding"]) ** 3))(q) ** 2)  # noqa: E731
        return jax.jit(jax.vmap(jax.grad(norm)))(jnp.stack([Q, 2 * Q]))

    np.testing.assert_allclose(curvature(attention), curvature(textbook), rtol=2e-4, atol=2e-4)


def test_attention_in_bf16_keeps_its_dtype_and_is_close():
    q, k, v = (x.astype(jnp.bfloat16) for x in (Q, KEY, V))
    y = attention(q, k, v, SEEN["padding"])
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), textbook(Q, KEY, V, SEEN["padding"]), atol=0.05)
    grads = jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, SEEN["padding"]).astype(jnp.float32)), (0, 1, 2))(
        q, k, v
    )
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 3


@pytest.mark.parametrize(("ours", "approximate"), [(gelu, False), (gelu_tanh, True)])
def test_gelu_is_exact_in_both_modes(ours, approximate):
    x = jnp.linspace(-6, 6, 41)
    exact = lambda x: jax.nn.gelu(x, approximate=approximate)  # noqa: E731
    np.testing.assert_allclose(ours(x), exact(x), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(ours))(x), jax.vmap(jax.grad(exact))(x), atol=5e-6)
    ones = jnp.ones_like(x)
    np.testing.assert_allclose(jax.jvp(ours, (x,), (ones,))[1], jax.jvp(exact, (x,), (ones,))[1], atol=5e-6)
