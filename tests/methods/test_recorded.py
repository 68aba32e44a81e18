"""Every recorded PEFT folder, read by the formulas alone, gives the outputs that PEFT's own model gave."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lorax_kit.models import LlamaModel
from tests.fixtures.recorded_methods import CASES, KINDS, LLAMA, apply, base, expected, inputs, tree
from tests.methods.peft_oracle import merged


def close(ours, theirs):
    assert np.isfinite(theirs).all()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_bare_models_are_torchs(kind):
    close(apply(kind)(base(kind), inputs(kind)), expected(kind))


@pytest.mark.parametrize("case", CASES)
def test_the_formulas_read_what_peft_wrote(case):
    kind, weights = CASES[case], merged(case)
    params = tree(kind, weights)
    if kind == "llama":
        untied = LlamaModel(dataclasses.replace(LLAMA, tie_word_embeddings=False))
        params["head"] = {"kernel": jnp.asarray(weights["lm_head.weight"].T, jnp.float32)}
        ours = untied.apply({"params": params}, inputs(kind), jnp.ones_like(inputs(kind)))
    else:
        ours = apply(kind)(params, inputs(kind))
    close(ours, expected(case))
    assert np.abs(expected(case) - expected(kind)).max() > 1e-2


def test_a_tied_head_moves_with_the_embedding_only_where_tying_was_asked_for():
    for case, same in {"tied": True, "tied_tokens": True, "tied_saved": True, "tied_input_only": False}.items():
        weights = merged(case)
        difference = np.abs(weights["lm_head.weight"] - weights["model.embed_tokens.weight"]).max()
        assert difference < 1e-6 if same else difference > 0.1, case
