"""LLaMA in NNX has the params, the names and the numbers of LLaMA in linen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax_kit as lk
from lorax_kit.core.paths import flatten
from lorax_kit.models import load_model
from lorax_kit.models.nnx import LlamaNnx, llama_nnx
from tests.models.test_families import copied, recorded


@pytest.mark.parametrize("family", ["llama_biases", "llama3", "mistral_window", "qwen2", "qwen3", "gemma"])
def test_its_logits_and_its_cache_are_those_of_transformers(tmp_path, family):
    loaded, found = load_model(copied(family, tmp_path / "x")), recorded(family)
    graph, state = nnx.split(llama_nnx(loaded.config, loaded.params))
    ids, mask = found["input_ids"], found["attention_mask"]

    @jax.jit
    def run(state):
        model = nnx.merge(graph, state)
        whole, cache, steps = model(ids, mask), model.empty_cache(3, 10), []
        for start, end in [(0, 5), (5, 6)]:
            logits, cache = model(ids[:, start:end], mask[:, start:end], cache)
            steps.append(logits)
        return whole, jnp.stack(steps, 1)

    whole, steps = run(state)
    np.testing.assert_allclose(whole[mask == 1], found["logits"][mask == 1], atol=1e-4, rtol=0)
    np.testing.assert_allclose(steps, whole[:, 4:6], atol=1e-5)


def test_its_params_have_the_names_of_the_linen_model_and_its_sites_run_factored(tmp_path):
    loaded, found = load_model(copied("qwen3", tmp_path / "x")), recorded("qwen3")
    graph, params = nnx.split(llama_nnx(loaded.config, loaded.params))
    names = {path.removesuffix("/value") for path in flatten(params)[0]}
    assert names == set(flatten(loaded.params)[0])
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(params), loaded.params)
    inputs = found["input_ids"], found["attention_mask"]

    def apply(params, *inputs):
        return nnx.merge(graph, params)(*inputs)

    rules = ["layer_*/attention/query/kernel/value", "layer_*/mlp/up/kernel/value"]
    spec = lk.Spec({pattern: lk.LoRA(rank=2) for pattern in rules})
    plan = lk.resolve(spec, params, apply, *inputs)
    _, factors = lk.split(params, plan, jax.random.key(0))
    factors = {p: f._replace(b=jax.random.normal(jax.random.key(1), f.b.shape)) for p, f in factors.items()}
    ours = jax.jit(lk.adapt(apply, plan))(params, factors, *inputs)
    assert len(plan.sites) == 4
    assert jnp.abs(ours - found["logits"]).max() > 0.1
    np.testing.assert_allclose(ours, jax.jit(apply)(lk.merge(params, factors, plan), *inputs), atol=1e-4)


def test_params_of_another_model_are_refused(tmp_path):
    loaded = load_model(copied("qwen3", tmp_path / "x"))
    with pytest.raises(ValueError, match=r"'head/kernel' has shape None, the config says \(12, 20\)"):
        llama_nnx(loaded.config, {k: x for k, x in loaded.params.items() if k != "head"})
    with pytest.raises(ValueError, match="for a decoder of 16 positions"):
        LlamaNnx(loaded.config, nnx.Rngs(0))(jnp.ones((1, 17), jnp.int32), jnp.ones((1, 17), jnp.int32))
