"""Meta-gradients against formulas by hand, and through the factored products against materialised weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.meta import Task, adapt_to, inner_rates, maml, reptile
from lorax_kit.models import BertClassifier, BertConfig, LlamaConfig, LlamaModel
from tests.draws import moved_leaves
from tests.meta.by_hand import (
    BASE,
    PLAN,
    START,
    TASKS,
    central,
    inner,
    loss_and_gradient,
    loss_fn,
    objective,
    task,
    vector,
)

RATE, STEPS = 0.1, 3
RATES = inner_rates(PLAN, START, RATE)


def test_inner_steps_are_plain_sgd():
    own, losses = jax.jit(lambda f: adapt_to(loss_fn, BASE, f, TASKS.support, RATES, steps=None))(START)
    theta, batches = vector(START), [task(i).support for i in range(3)]
    np.testing.assert_allclose(vector(own), inner(theta, batches, RATE), rtol=1e-5, atol=1e-6)
    expected = [loss_and_gradient(inner(theta, batches[:i], RATE), batches[i])[0] for i in range(3)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    same, _ = adapt_to(loss_fn, BASE, START, task(0).support, RATES, steps=2)
    np.testing.assert_allclose(vector(same), inner(theta, [batches[0]] * 2, RATE), rtol=1e-5, atol=1e-6)


def test_a_weighted_loss_counts_by_its_weights():
    weights = jnp.array([1.0, 0.0, 2.0, 0.0, 1.0])

    def weighted(base, factors, batch):
        by_example = jax.vmap(lambda x, y: loss_fn(base, factors, (x[None], y[None])))(*batch)
        return lk.Weighted(jnp.sum(by_example * weights), jnp.sum(weights))

    x, y = TASKS.support[0][0], TASKS.support[1][0]
    repeated = tuple(array[jnp.array([0, 2, 2, 4])] for array in (x, y))
    ours = maml(weighted, steps=2)(BASE, START, RATES, Task((x, y), (x, y)))
    theirs = maml(loss_fn, steps=2)(BASE, START, RATES, Task(repeated, repeated))
    assert float(ours.loss) == pytest.approx(float(theirs.loss), rel=1e-5)
    np.testing.assert_allclose(vector(ours.factors), vector(theirs.factors), rtol=1e-4, atol=1e-6)


def test_maml_is_the_gradient_through_the_inner_steps():
    found = jax.jit(maml(loss_fn, steps=STEPS))(BASE, START, RATES, task(0))
    theta = vector(START)
    assert float(found.loss) == pytest.approx(objective(theta, RATE, STEPS, task(0)), rel=1e-5)
    by_differences = central(lambda x: objective(x, RATE, STEPS, task(0)), theta)
    np.testing.assert_allclose(vector(found.factors), by_differences, rtol=1e-4, atol=1e-5)
    # It is not the first-order gradient: the test above could tell.
    first = maml(loss_fn, steps=STEPS, order=1)(BASE, START, RATES, task(0))
    assert np.abs(by_differences - vector(first.factors)).max() > 0.05


def test_rates_have_the_gradient_of_the_outcome():
    found = jax.jit(maml(loss_fn, steps=STEPS))(BASE, START, RATES, task(1))
    theta, sizes = vector(START), (8, 6, 3)
    by_differences = central(lambda r: objective(theta, np.repeat(r, sizes), STEPS, task(1)), np.full(3, RATE))
    np.testing.assert_allclose(vector(found.rates), by_differences, rtol=1e-4, atol=1e-5)


def test_first_order_is_the_gradient_where_the_inner_steps_end():
    found = jax.jit(maml(loss_fn, steps=STEPS, order=1))(BASE, START, RATES, task(0))
    end = inner(vector(START), [task(0).support] * STEPS, RATE)
    np.testing.assert_allclose(vector(found.factors), loss_and_gradient(end, task(0).query)[1], rtol=1e-4, atol=1e-6)


def test_reptile_points_from_the_end_to_the_start():
    batches = TASKS.support  # three steps, each of other examples
    found = jax.jit(reptile(loss_fn))(BASE, START, RATES, batches)
    theta = vector(START)
    end = inner(theta, [task(i).support for i in range(3)], RATE)
    np.testing.assert_allclose(vector(found.factors), theta - end, rtol=1e-4, atol=1e-6)


SIZES = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 5)))
BERT = BertClassifier(BertConfig(**SIZES, max_position_embeddings=8), 3)
LLAMA = LlamaModel(LlamaConfig(**SIZES, max_position_embeddings=8, num_key_value_heads=1))


def cross_entropy(logits, answers):
    logs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logs, answers[..., None], axis=-1))


def through_weights(call, plan, base, factors, rates, one, steps):
    """The meta-objective with the weights materialised and the inner steps written out, all by autodiff."""

    def loss(f, batch):
        return cross_entropy(call(lk.merge(base, f, plan), batch[0]), batch[1])

    for _ in range(steps):
        grads = jax.grad(loss)(factors, one.support)
        factors = jax.tree.map(lambda x, r, g: x - r * g, factors, rates, grads)
    return loss(factors, one.query)


CASES = {"BERT, LoRA over int8": (BERT, lk.LoRA, ["**/mlp/*/kernel"]), "LLaMA, DoRA": (LLAMA, lk.DoRA, [])}


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_go_through_factored_products(name):
    """The models' own attention and recomputation included, all tasks of a batch at once."""
    model, method, quantised = CASES[name]
    call = lambda p, ids: model.apply({"params": p}, ids, jnp.ones(ids.shape))  # noqa: E731
    params = model.init(jax.random.key(0), IDS, jnp.ones(IDS.shape))["params"]
    params = lk.quantize(params, quantised, "int8") if quantised else params
    head = {"classifier/*": lk.Full()} if model is BERT else {}
    plan = lk.resolve(lk.Spec({"**/{query,value,up,down}/kernel": method(rank=2), **head}), params, call, IDS)
    base, factors = lk.split(params, plan, jax.random.key(1))
    factors = moved_leaves(plan, factors)
    rates = inner_rates(plan, factors, 0.3)
    adapted = lk.adapt(call, plan, trials=2)

    def loss(base, f, batch):
        return cross_entropy(adapted(base, f, batch[0]), batch[1])

    answers = IDS[:, 0] % 3 if model is BERT else IDS
    both = Task(
        (jnp.stack([IDS, IDS[::-1]]), jnp.stack([answers, answers])),
        (jnp.stack([IDS[:, ::-1], IDS]), jnp.stack([answers, answers[::-1]])),
    )

    @jax.jit
    def compare(factors):
        ours = jax.vmap(lambda one: maml(loss, steps=2)(base, factors, rates, one))(both)
        theirs = jax.vmap(
            lambda one: jax.value_and_grad(lambda f: through_weights(call, plan, base, f, rates, one, 2))(factors)
        )(both)
        return ours, theirs

    ours, (values, grads) = compare(factors)
    np.testing.assert_allclose(ours.loss, values, rtol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads))
    for x, y in zip(jax.tree.leaves(ours.factors), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * largest)
