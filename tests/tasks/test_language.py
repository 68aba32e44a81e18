"""Losses of words in pieces against the whole, for any cut, adapted and quantised tables, and real models' heads."""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.models import load_model, word_logits
from lorax_kit.tasks import Told, token_sums, token_sums_in_pieces
from tests.draws import draw
from tests.models.test_families import copied, recorded

ROWS, TOKENS, WIDTH, WORDS = 3, 7, 6, 11
RNG = np.random.default_rng(0)
BATCH = Told(
    RNG.integers(0, WORDS, (ROWS, TOKENS)).astype(np.int32),
    np.ones((ROWS, TOKENS), np.int32),
    (RNG.uniform(size=(ROWS, TOKENS)) < 0.7).astype(np.int32),
)
HIDDEN, TABLE = draw(0, ROWS, TOKENS, WIDTH), draw(1, WORDS, WIDTH)


def in_pieces(hidden, table, at_once):
    return token_sums_in_pieces(lambda x: x @ table.T, hidden, BATCH, at_once=at_once)


@pytest.mark.parametrize("at_once", [1, WORDS, 4 * WORDS, 7 * WORDS, 10**9])
def test_sums_and_gradients_are_those_of_the_whole(at_once):
    def ours(hidden, table):
        losses, right, count = in_pieces(hidden, table, at_once)
        return losses / count, (right, count)

    def whole(hidden, table):
        losses, right, count = token_sums(hidden @ table.T, BATCH)
        return losses / count, (right, count)

    found, wanted = (jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(HIDDEN, TABLE) for f in (ours, whole))
    assert found[0][1] == wanted[0][1]
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-7)


def sizes(jaxpr):
    """The sizes of all values of a program, those of its loops among them."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from sizes(getattr(inner, "jaxpr", inner))


def test_the_logits_are_never_there_as_a_whole():
    def largest(at_once):
        gradient = jax.grad(lambda x: in_pieces(x, TABLE, at_once)[0])
        return max(sizes(jax.make_jaxpr(gradient)(HIDDEN).jaxpr))

    assert largest(10**9) == ROWS * TOKENS * WORDS
    assert largest(4 * WORDS) == HIDDEN.size  # rather than three places' logits


@pytest.mark.parametrize("quantised", [False, True])
def test_an_adapted_table_runs_factored_in_every_piece(quantised):
    def fn(params, hidden):
        return in_pieces(hidden, params["table"], 4 * WORDS)[0]

    plan = lk.resolve(lk.Spec({"table": lk.LoRA(rank=2)}), {"table": TABLE}, fn, HIDDEN)
    base, factors = lk.split({"table": TABLE}, plan, jax.random.key(0))
    factors = jax.tree.map(lambda x: x + 0.3 * draw(x.size, *x.shape), factors)
    base = lk.quantize(base, ["table"], "int8") if quantised else base
    assert {use.how for use in lk.explain(lk.adapt(fn, plan), base, factors, HIDDEN).rows} <= {"factored", "merged"}
    merged = lk.merge(base, factors, plan)
    found = jax.jit(jax.value_and_grad(lambda f: lk.adapt(fn, plan)(base, f, HIDDEN)))(factors)
    wanted = jax.jit(jax.value_and_grad(lambda f: fn(lk.merge(base, f, plan), HIDDEN)))(factors)
    np.testing.assert_allclose(found[0], fn(merged, HIDDEN), rtol=1e-5)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama3", "gemma", "qwen3"])
def test_words_of_hidden_states_are_the_models_own_logits(tmp_path, family):
    loaded, found = load_model(copied(family, tmp_path / "x")), recorded(family)
    given = {"params": loaded.params}, found["input_ids"], found["attention_mask"]
    hidden = loaded.model.apply(*given, hidden=True)
    assert jnp.array_equal(word_logits(loaded.params, hidden), loaded.model.apply(*given))
