"""The outer step, its promises, and what bad input says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.meta import MetaGradient, Task, adapt_to, inner_rates, maml, meta_step, reptile
from tests.draws import draw
from tests.meta.by_hand import BASE, PLAN, START, TASKS, apply, inner, loss_fn, task, vector
from tests.traces import Traced

RATES = inner_rates(PLAN, START, 0.1)


def mean_gradient(meta, tasks):
    """By a loop over the tasks."""
    found = [meta(BASE, START, RATES, jax.tree.map(lambda x, i=i: x[i], tasks)) for i in range(3)]
    return np.mean([vector(one.factors) for one in found], axis=0), np.mean([float(one.loss) for one in found])


@pytest.mark.parametrize("order", [1, 2])
def test_a_step_is_the_mean_of_a_loop_over_tasks(order):
    meta = maml(loss_fn, steps=2, order=order)
    init, step = meta_step(meta, optax.sgd(0.5))
    state, info = step(init(START, RATES), BASE, TASKS)
    gradient, loss = mean_gradient(jax.jit(meta), TASKS)
    np.testing.assert_allclose(vector(state.factors), vector(START) - 0.5 * gradient, rtol=1e-5, atol=1e-6)
    assert float(info.loss) == pytest.approx(loss, rel=1e-5)
    assert float(info.grad_norm) == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    assert info.aux["inner"].shape == (2,)


def test_reptile_moves_towards_the_mean_of_where_tasks_end():
    init, step = meta_step(reptile(loss_fn), optax.sgd(0.25))
    batches = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), TASKS.support)  # two tasks of three inner steps
    state, _ = step(init(START, RATES), BASE, batches)
    theta, steps = vector(START), [task(i).support for i in range(3)]
    ends = np.mean([inner(theta, steps, 0.1), inner(theta, steps[::-1], 0.1)], axis=0)
    np.testing.assert_allclose(vector(state.factors), theta + 0.25 * (ends - theta), rtol=1e-4, atol=1e-6)


def test_one_compilation_serves_all_tasks_and_rates_and_the_base_stays():
    before = jax.tree.map(np.asarray, BASE)
    tx = lk.partition(optax.adam(1e-2), PLAN)
    traced = Traced(loss_fn)
    init, step = meta_step(maml(traced, steps=2), tx, rate_tx=optax.adam(1e-2))
    first = None
    for rate in (0.1, {"a": 0.02, "b": 0.05, "full": 0.0}):
        state = init(START, inner_rates(PLAN, START, rate))
        for i in range(3):
            state, info = step(state, BASE, jax.tree.map(lambda x, i=i: x + 0.1 * i, TASKS))
            assert bool(info.finite)
            first = first or traced.traces
    assert traced.traces == first
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), before, BASE)))
    moved = np.abs(vector(state.factors) - vector(START))
    assert moved.min() > 0  # the head in full, too
    assert int(state.step) == 3


def test_learnt_rates_stay_positive_and_zero_stays_zero():
    rates = inner_rates(PLAN, START, {"a": 0.02, "b": 0.05, "full": 0.0})
    meta = maml(loss_fn, steps=2)
    init, step = meta_step(meta, optax.sgd(0.0), rate_tx=optax.sgd(0.3))
    state, _ = step(init(START, rates), BASE, TASKS)
    slope = np.mean([float(meta(BASE, START, rates, task(i)).rates["w"].b) for i in range(3)])
    assert float(state.rates["w"].b) == pytest.approx(0.05 * np.exp(-0.3 * 0.05 * slope), rel=1e-5)
    init, step = meta_step(meta, optax.sgd(0.0), rate_tx=optax.adamw(1.0))
    state = init(START, rates)
    for _ in range(4):
        state, info = step(state, BASE, TASKS)
    assert float(state.rates["w"].a) > 0
    assert float(state.rates["c"].value) == 0
    assert bool(info.finite)


def test_frozen_leaves_have_no_rate_and_do_not_move():
    plan = lk.resolve(lk.Spec({"w": lk.VeRA(rank=2), "c": lk.Full()}), BASE, apply, draw(0, 5, 4))
    base, factors = lk.split(BASE, plan, jax.random.key(0))
    rates = inner_rates(plan, factors, 0.1)
    assert rates["w"].a is None
    assert rates["w"].b is None
    adapted = lk.adapt(apply, plan)
    loss = lambda base, f, batch: jnp.mean((adapted(base, f, batch[0]) - batch[1]) ** 2)  # noqa: E731
    own, _ = adapt_to(loss, base, factors, task(0).support, rates, steps=2)
    init, step = meta_step(maml(loss, steps=2), lk.partition(optax.sgd(0.1), plan), rate_tx=optax.sgd(0.1))
    state, _ = step(init(factors, rates), base, TASKS)
    for tree in (own, state.factors):
        np.testing.assert_array_equal(tree["w"].a, factors["w"].a)
        np.testing.assert_array_equal(tree["w"].b, factors["w"].b)
        assert (tree["w"].v != factors["w"].v).all()
    assert state.rates["w"].a is None


def test_a_step_that_is_not_finite_changes_nothing():
    init, step = meta_step(maml(loss_fn, steps=2), optax.adam(0.1), rate_tx=optax.sgd(0.1))
    state = init(START, RATES)
    before = jax.tree.map(np.asarray, state)
    state, info = step(state, BASE, jax.tree.map(lambda x: x.at[0, 0, 0].set(jnp.nan), TASKS))
    assert not bool(info.finite)
    assert int(state.step) == 1
    for x, y in zip(jax.tree.leaves(before._replace(step=0)), jax.tree.leaves(state._replace(step=0)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_learnt_start_adapts_better_than_the_one_before():
    """Each task adds a hidden update or takes it away: which of the two only its support tells."""
    rng = np.random.default_rng(0)
    w, c = (np.asarray(x) for x in (BASE["w"], BASE["c"]))
    hidden = rng.normal(size=(4, 1)) @ rng.normal(size=(1, 3))
    _, zero = lk.split(BASE, PLAN, jax.random.key(1))

    def tasks(count):
        signs, xs = rng.choice([-1.0, 1.0], size=(count, 1, 1)), rng.normal(size=(2, count, 5, 4))
        return Task(*((jnp.float32(x), jnp.float32(x @ (w + signs * hidden) + c)) for x in xs))

    meta = maml(loss_fn, steps=3)
    init, step = meta_step(meta, lk.partition(optax.adam(2e-2), PLAN))
    state, held_out = init(zero, RATES), tasks(40)
    after = jax.jit(jax.vmap(lambda f, one: meta(BASE, f, RATES, one).loss, in_axes=(None, 0)))
    start = after(state.factors, held_out)
    for _ in range(150):
        state, _ = step(state, BASE, tasks(8))
    assert float(jnp.mean(after(state.factors, held_out))) < 0.7 * float(jnp.mean(start))


def test_fit_reads_a_meta_step():
    init, step = meta_step(maml(loss_fn, steps=1), optax.sgd(0.05))
    fitted = lk.fit(step, init(START, RATES), BASE, [[TASKS] * 3] * 2, progress=False)
    assert [row["steps"] for row in fitted.history] == [3, 6]
    assert fitted.history[1]["loss"] < fitted.history[0]["loss"]


ONE = task(0).support
ONE_OF_MANY = jax.tree.map(lambda x: x[None], TASKS.support)  # one task of three inner steps


def stepped(meta, tasks, **options):
    init, step = meta_step(meta, optax.sgd(0.1), jit=False, **options)
    return step(init(START, RATES), BASE, tasks)


BAD = {
    "there are no tasks": lambda: stepped(maml(loss_fn, steps=1), Task((), ())),
    "has 2 entries": lambda: stepped(maml(loss_fn, steps=1), Task(TASKS.support, jax.tree.map(lambda x: x[:2], ONE))),
    "the number of inner steps is 0": lambda: maml(loss_fn, steps=0),
    "the number of inner steps is True": lambda: adapt_to(loss_fn, BASE, START, ONE, RATES, steps=True),
    "order is 3": lambda: maml(loss_fn, steps=1, order=3),
    "tx is 0.1": lambda: meta_step(maml(loss_fn, steps=1), 0.1),
    "rate_tx is 0.1": lambda: stepped(maml(loss_fn, steps=1), TASKS, rate_tx=0.1),
    "has none of them": lambda: stepped(
        reptile(loss_fn), jax.tree.map(lambda x: x[None], TASKS.support), rate_tx=optax.sgd(0.1)
    ),
    "one number for each leaf": lambda: adapt_to(loss_fn, BASE, START, ONE, {"w": RATES["w"]}, steps=1),
    "rates lack label 'b'": lambda: inner_rates(PLAN, START, {"a": 0.1, "full": 0.1}),
    "name the unknown label 'v'": lambda: inner_rates(PLAN, START, {"a": 0.1, "b": 0.1, "full": 0.1, "v": 0.1}),
    "rate of 'a' is -0.1": lambda: inner_rates(PLAN, START, -0.1),
    "rate of 'a' is nan": lambda: inner_rates(PLAN, START, float("nan")),
    "the loss has shape": lambda: adapt_to(lambda *_: jnp.ones(2), BASE, START, ONE, RATES, steps=1),
    "factors lack 'c'": lambda: inner_rates(PLAN, {"w": START["w"]}, 0.1),
}


@pytest.mark.parametrize("says", BAD)
def test_bad_input_is_said(says):
    with pytest.raises(lk.LoraxError, match=says):
        BAD[says]()


def test_a_meta_gradient_of_ones_own_plugs_in():
    """Joint training: the gradient of the query's loss where the start is, no inner steps."""

    def joint(base, factors, rates, one):
        loss, grads = jax.value_and_grad(lambda f: loss_fn(base, f, one.query))(factors)
        return MetaGradient(loss, loss[None], grads, None)

    init, step = meta_step(joint, optax.sgd(0.5))
    state, _ = step(init(START, RATES), BASE, TASKS)
    expected = vector(START) - 0.5 * mean_gradient(joint, TASKS)[0]
    np.testing.assert_allclose(vector(state.factors), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rates", [0.1, {"w": 0.1}, {"w": {"a": 0.1}}, None])
def test_rates_that_are_not_one_for_each_leaf_are_refused_at_once(rates):
    init, _ = meta_step(maml(loss_fn, steps=1), optax.sgd(0.5))
    with pytest.raises(lk.LoraxError, match="do not hold one number for each leaf"):
        init(START, rates)
