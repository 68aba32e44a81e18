"""Rows that each have an adapter write their keys and values in place, as those of one adapter do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax_kit as lk
from lorax_kit.generate import Decoder, per_row_decoder
from lorax_kit.generate.in_place import in_place
from lorax_kit.models import LlamaConfig, LlamaModel

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_slices_are_the_same_whatever_is_mapped():
    rng = np.random.default_rng(0)
    x, new = (jnp.asarray(rng.normal(size=(3, 2, n, 4)), jnp.float32) for n in (6, 2))
    end, ends = jnp.int32(3), jnp.asarray([0, 3, 4], jnp.int32)
    expected = np.array(x)
    expected[:, :, 3:5] = new

    def plain(x, new, end):
        return {"all": lax.dynamic_update_slice_in_dim(x * 2, new, end, axis=1), "end": end + 1}

    np.testing.assert_array_equal(in_place(plain)(x[0] / 2, new[0], end)["all"], expected[0])
    shared = (0, 0, None), (x / 2, new, end)
    np.testing.assert_array_equal(jax.vmap(in_place(plain), shared[0])(*shared[1])["all"], expected)
    others = [((0, 0, 0), (x, new, ends)), ((0, None, None), (x, new[0], end)), ((None, 0, 0), (x[0], new, ends))]
    for axes, given in [shared, *others]:
        found, wanted = (jax.vmap(f, axes)(*given) for f in (in_place(plain), plain))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_step_of_rows_with_an_adapter_each_copies_no_cache():
    """The temporaries of the compiled step stay far below the cache, which is donated."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    model, rows, slots = LlamaModel(config), 4, 2048
    ids = jnp.ones((1, 2), jnp.int32)
    params = model.init(jax.random.key(0), ids, ids)["params"]

    def step(params, ids, mask, *cache):
        return model.apply({"params": params}, ids, mask, *cache)

    plan = lk.resolve(lk.Spec({"layer_*/**/kernel": lk.LoRA(rank=1)}), params, step, ids, ids)
    adapter = lk.algebra.Adaptation(plan, lk.split(params, plan, jax.random.key(0))[1])
    stacked = lk.algebra.stack([adapter] * rows, base=params)
    decoder = per_row_decoder(Decoder(begin=None, step=step), stacked)
    cache, one = model.empty_cache(rows, slots), jnp.ones((rows, 1), jnp.int32)
    given = params, lk.algebra.rows_of(stacked, range(rows))
    program = jax.jit(decoder.step, donate_argnums=3).lower(given, one, one, cache).compile()
    held = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert held > 2e6
    assert program.memory_analysis().temp_size_in_bytes < held / 4
