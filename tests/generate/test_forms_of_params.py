"""Quantised and compressed params write what the params that they stand for write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.core.lowrank import LowRank, dense
from lorax_kit.core.quantised import Quantised
from lorax_kit.generate import Writer, adapted, decoder_of
from lorax_kit.models import load_model
from tests.models.llama_files import write_folder

pytestmark = pytest.mark.usefixtures("standard_promotion")
KERNELS = ["layer_*/**/kernel"]
PROMPTS = [[70, 71, 72], [80]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    write_folder(folder, max_position_embeddings=64)
    return load_model(folder)


def is_whole(x):
    return isinstance(x, LowRank | Quantised)


def restored(params):
    return jax.tree.map(dense, params, is_leaf=is_whole)


def halved(params):
    """Every kernel of the feed-forward blocks as the product of its leading half of singular vectors."""

    def cut(path, w):
        if path[1].key != "mlp" or path[-1].key != "kernel":
            return w
        u, s, v = np.linalg.svd(np.asarray(w), full_matrices=False)
        rank = len(s) // 2
        return LowRank(a=jnp.asarray((u * s)[:, :rank].T), b=jnp.asarray(v[:rank]), shape=w.shape, dtype=w.dtype)

    layers = {name: x for name, x in params.items() if name.startswith("layer_")}
    return params | jax.tree_util.tree_map_with_path(cut, layers)


def same(found, expected):
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    "form",
    [lambda p: lk.quantize(p, KERNELS, "nf4"), lambda p: lk.quantize(p, KERNELS, "int8"), halved],
    ids=["nf4", "int8", "low-rank"],
)
def test_params_of_each_form_write_what_their_dense_form_writes(loaded, form):
    params = form(loaded.params)
    assert sum(map(is_whole, jax.tree.leaves(params, is_leaf=is_whole))) >= 6
    writer = Writer(decoder_of(loaded), loaded.tokenizer)
    found = writer(params, PROMPTS, max_new_tokens=6)
    same(found, writer(restored(params), PROMPTS, max_new_tokens=6))
    assert [one.logprobs for one in found] != [one.logprobs for one in writer(loaded.params, PROMPTS, max_new_tokens=6)]


def test_a_factored_adapter_of_a_quantised_base_writes_what_the_merged_dense_base_writes(loaded):
    base = lk.quantize(loaded.params, KERNELS, "nf4")
    ids = jnp.zeros((1, 4), jnp.int32)

    def fn(params, ids, mask):
        return loaded.model.apply({"params": params}, ids, mask)

    plan = lk.resolve(lk.Spec({KERNELS[0]: lk.LoRA(rank=2, alpha=8)}), loaded.params, fn, ids, ids)
    _, factors = lk.split(loaded.params, plan, jax.random.key(0))
    factors = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape, x.dtype) / 6, factors)
    found = Writer(adapted(decoder_of(loaded), plan), loaded.tokenizer)((base, factors), PROMPTS, max_new_tokens=6)
    merged = lk.merge(restored(base), factors, plan)
    same(found, Writer(decoder_of(loaded), loaded.tokenizer)(merged, PROMPTS, max_new_tokens=6))
