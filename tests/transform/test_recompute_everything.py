"""recompute="everything": the same numbers, for a small part of the memory."""

import jax
import pytest

import lorax_kit as lk
from tests.transform.test_recompute import MODELS, assert_close, bert, loss, prepare


def everything(model, kernel="auto"):
    """(base, factors, adapted with everything formed again and with everything kept, keywords)."""
    base, factors, (ours, theirs), keywords = prepare(model, kernel)
    return base, factors, (lk.adapt(model.fn, ours.plan, kernel=kernel, recompute="everything"), theirs), keywords


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_as_without(name):
    model = MODELS[name]
    base, factors, both, keywords = everything(model)
    losses = [lambda f, fn=fn: loss(fn(base, f, *model.inputs, **keywords)) for fn in both]
    found = [jax.jit(jax.value_and_grad(one))(factors) for one in losses]
    assert_close(*found, 0.1 if name.startswith("bf16") else 1e-5)


def test_over_a_quantised_base():
    model = bert()
    base, factors, both, _ = everything(model)
    base = lk.quantize(base, ["**/kernel"], "nf4")
    losses = [lambda f, fn=fn: loss(fn(base, f, *model.inputs)) for fn in both]
    assert_close(*(jax.jit(jax.value_and_grad(one))(factors) for one in losses), 1e-5)


def test_a_third_of_the_temporaries_for_less_than_half_as_many_flops_more():
    model = bert(layers=8, width=64, tokens=64, batch=8)
    base, factors, both, _ = everything(model)
    grads = [jax.jit(jax.grad(lambda f, fn=fn: loss(fn(base, f, *model.inputs)))) for fn in both]
    ours, theirs = (g.lower(factors).compile() for g in grads)
    assert ours.memory_analysis().temp_size_in_bytes <= theirs.memory_analysis().temp_size_in_bytes / 3
    assert ours.cost_analysis()["flops"] <= 1.5 * theirs.cost_analysis()["flops"]


def test_another_word_is_refused():
    base, _, (ours, _), _ = prepare(MODELS["mlp"])
    with pytest.raises(lk.PlanError, match="recompute is 'all'; it must be True, False or 'everything'"):
        lk.adapt(MODELS["mlp"].fn, ours.plan, recompute="all")
    assert base
