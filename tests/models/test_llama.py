"""LLaMA's numbers against float64 numpy: logits, gradients, causality, padding, groups of heads; sizes refused."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.core.paths import flatten
from lorax_kit.models import LlamaConfig, LlamaModel, llama_names
from tests.models.llama_numpy import forward

TINY = LlamaConfig(
    vocab_size=13,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=9,
    rope_theta=100.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
OWN_HEAD = replace(TINY, tie_word_embeddings=False)
IDS = np.array([[2, 5, 7, 1, 9, 3], [2, 8, 3, 0, 0, 0], [0, 0, 4, 11, 12, 6]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]], np.int32)


def drawn(config):
    """Params whose every leaf is drawn, so that no norm is trivial."""
    params = LlamaModel(config).init(jax.random.key(0), IDS, MASK)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape), jnp.float32), params)


def as_torch(params, config):
    named, _ = flatten(params)
    names = llama_names(config)
    assert set(names) == set(named)
    return {name: np.asarray(named[p]).T if p.endswith("kernel") else named[p] for p, name in names.items()}


def logits(config, params, ids=IDS, mask=MASK):
    return np.asarray(jax.jit(LlamaModel(config).apply)({"params": params}, ids, mask))


def reference(config, weights, ids=IDS, mask=MASK):
    c = config
    sizes = {"layers": c.num_hidden_layers, "heads": c.num_attention_heads, "shared": c.num_key_value_heads}
    return forward(weights, ids, mask, **sizes, theta=c.rope_theta, eps=c.rms_norm_eps)


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_a_float64_forward_pass(shared, tied):
    config = replace(TINY, num_key_value_heads=shared, tie_word_embeddings=tied)
    params = drawn(config)
    expected = reference(config, as_torch(params, config))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(config, params)[MASK == 1], expected[MASK == 1], atol=1e-4, rtol=0)


def test_gradients_equal_central_differences_of_the_float64_forward_pass():
    params = drawn(OWN_HEAD)
    probe = np.random.default_rng(1).normal(size=(*IDS.shape, TINY.vocab_size)) * MASK[..., None]

    def loss(params):
        return jnp.sum(LlamaModel(OWN_HEAD).apply({"params": params}, IDS, MASK) * jnp.asarray(probe, jnp.float32))

    grads = as_torch(jax.jit(jax.grad(loss))(params), OWN_HEAD)
    assert all(np.isfinite(x).all() for x in grads.values())
    weights = {name: np.asarray(x, np.float64) for name, x in as_torch(params, OWN_HEAD).items()}

    def shifted(name, index, by):
        moved = dict(weights)
        moved[name] = weights[name].copy()
        moved[name][index] += by
        return np.sum(reference(OWN_HEAD, moved) * probe)

    places = {
        "model.embed_tokens.weight": (5, 1),
        "model.layers.0.input_layernorm.weight": (4,),
        "model.layers.0.self_attn.q_proj.weight": (3, 2),
        "model.layers.0.self_attn.k_proj.weight": (5, 7),
        "model.layers.1.self_attn.v_proj.weight": (1, 9),
        "model.layers.0.mlp.gate_proj.weight": (7, 3),
        "model.layers.1.mlp.up_proj.weight": (2, 0),
        "model.layers.1.mlp.down_proj.weight": (1, 8),
        "model.norm.weight": (6,),
        "lm_head.weight": (12, 3),
    }
    for name, index in places.items():
        expected = (shifted(name, index, 1e-5) - shifted(name, index, -1e-5)) / 2e-5
        assert abs(expected) > 1e-3, name
        np.testing.assert_allclose(grads[name][index], expected, rtol=1e-3, err_msg=name)


def test_later_tokens_do_not_change_earlier_logits():
    params = drawn(TINY)
    before = logits(TINY, params)[0]
    for t in range(1, IDS.shape[1]):
        later = IDS[:1].copy()
        later[0, t:] = (later[0, t:] + 1) % TINY.vocab_size
        after = logits(TINY, params, later, MASK[:1])[0]
        np.testing.assert_allclose(after[:t], before[:t], atol=1e-5)
        assert np.abs(after[t] - before[t]).max() > 1e-2


def test_padding_on_either_side_does_not_influence_what_counts():
    params = drawn(TINY)
    out = logits(TINY, params)
    other = logits(TINY, params, np.where(MASK == 1, IDS, 11).astype(np.int32))
    np.testing.assert_array_equal(out[MASK == 1], other[MASK == 1])
    right = logits(TINY, params, IDS[1:2, :3], MASK[1:2, :3])
    left = logits(TINY, params, IDS[2:, 2:], MASK[2:, 2:])
    np.testing.assert_allclose(right[0], out[1, :3], atol=1e-5)
    np.testing.assert_allclose(left[0], out[2, 2:], atol=1e-5)


def test_shared_keys_and_values_equal_one_of_each_per_head_repeated():
    params = drawn(TINY)
    one_each = replace(TINY, num_key_value_heads=4)

    def repeat(path, x):
        if path[-2].key not in ("key", "value"):
            return x
        return jnp.repeat(x.reshape(16, 2, 4), 2, axis=1).reshape(16, 16)

    np.testing.assert_allclose(
        logits(one_each, jax.tree_util.tree_map_with_path(repeat, params)), logits(TINY, params), atol=1e-5
    )


def test_every_kernel_runs_factored_and_the_tied_embedding_as_both_of_its_uses(key):
    params = drawn(TINY)

    def apply(params, ids, mask):
        return LlamaModel(TINY).apply({"params": params}, ids, mask)

    spec = lk.Spec({"**/kernel": lk.LoRA(rank=2, alpha=4), "embeddings/embedding": lk.LoRA(rank=2, alpha=4)})
    plan = lk.resolve(spec, params, apply, IDS, MASK)
    base, factors = lk.split(params, plan, key)
    factors = {p: f._replace(**{n: f._asdict()[n] + 0.1 for n in ("a", "b")}) for p, f in factors.items()}
    adapted = lk.adapt(apply, plan)
    merged = jax.jit(apply)(lk.merge(base, factors, plan), IDS, MASK)
    np.testing.assert_allclose(jax.jit(adapted)(base, factors, IDS, MASK), merged, atol=1e-4)
    assert len(factors) == 2 * 7 + 1
    assert lk.explain(adapted, base, factors, IDS, MASK).materialised == ()


def test_bfloat16_activations_stay_close_and_logits_are_fp32():
    for config in (TINY, OWN_HEAD):
        params = {"params": drawn(config)}
        exact = LlamaModel(config).apply(params, IDS, MASK)
        rough = LlamaModel(config, dtype=jnp.bfloat16).apply(params, IDS, MASK)
        assert rough.dtype == exact.dtype == jnp.float32
        assert 0 < np.abs(rough - exact)[MASK == 1].max() < 0.05 * np.abs(exact).max()
        halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        np.testing.assert_allclose(LlamaModel(config).apply(halved, IDS, MASK), exact, atol=0.1 * np.abs(exact).max())


def test_a_text_longer_than_the_positions_is_refused():
    long = np.ones((1, 10), np.int32)
    with pytest.raises(ValueError, match="a text of 10 tokens, for a decoder of 9 positions"):
        LlamaModel(TINY).apply({"params": drawn(TINY)}, long, long)


BAD_SIZES = [
    ({"vocab_size": 0}, "vocab_size is 0; it must be an integer of at least 1."),
    ({"hidden_size": "16"}, "hidden_size is '16'; it must be an integer of at least 1."),
    ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be an integer of at least 1."),
    ({"rope_theta": float("nan")}, "rope_theta is nan; it must be a finite number above 0."),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05; it must be a finite number above 0."),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false."),
    ({"num_attention_heads": 3}, "3 heads do not divide hidden_size 16 into heads of an even size."),
    ({"num_attention_heads": 16}, "16 heads do not divide hidden_size 16 into heads of an even size."),
    ({"num_key_value_heads": 3}, "3 key and value heads do not divide 4 heads into groups."),
]


@pytest.mark.parametrize(("change", "says"), BAD_SIZES)
def test_bad_sizes_say(change, says):
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        replace(TINY, **change)
