"""Any optax optimiser: those that ask for the loss, those whose state starts as the factors, and what a step lacks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import lorax_kit as lk

X = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)}
FN = lambda p, x: x @ p["w"]  # noqa: E731
PLAN = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), PARAMS, FN, X)
BASE, FACTORS = lk.split(PARAMS, PLAN, jax.random.key(0))
ADAPTED = lk.adapt(FN, PLAN)


def loss(base, f, x):
    return jnp.mean((ADAPTED(base, f, x) - 1) ** 2)


def over_shard_map(loss, tx):
    init, step = lk.make_step(loss, tx, axis_name="data", jit=False)
    specs = {"mesh": lk.device_mesh(), "in_specs": (P(), P(), P("data")), "out_specs": (P(), P())}
    return init, jax.jit(jax.shard_map(step, **specs))


MAKERS = {
    "accumulate": lambda loss, tx: lk.make_step(loss, tx, accumulate=2),
    "pmap": lk.pmap_step,
    "mesh": lambda loss, tx: lk.sharded_step(loss, tx, lk.device_mesh()),
    "shard_map": over_shard_map,
}


def losses(tx, make=lk.make_step, steps=3):
    init, step = make(loss, tx)
    state, seen = init(FACTORS), []
    for _ in range(steps):
        state, info = step(state, BASE, X)
        seen.append(float(info.loss))
    return seen, state


def by_hand(tx, steps=3):
    """The same with plain optax and autodiff, every extra argument given."""
    value_fn = jax.jit(lambda f: loss(BASE, f, X))
    factors, state, seen = FACTORS, tx.init(FACTORS), []
    for _ in range(steps):
        value, grad = jax.value_and_grad(value_fn)(factors)
        extra = {"value": value, "grad": grad, "value_fn": value_fn}
        updates, state = optax.with_extra_args_support(tx).update(grad, state, factors, **extra)
        factors = optax.apply_updates(factors, updates)
        seen.append(float(value))
    return seen


WANT_THE_LOSS = {
    "lbfgs": lambda: optax.lbfgs(),
    "backtracking": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
    "polyak": lambda: optax.polyak_sgd(max_learning_rate=0.1),
    "plateau": lambda: optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)),
}


@pytest.mark.parametrize("name", WANT_THE_LOSS)
def test_an_optimiser_that_needs_the_loss_has_it(name):
    with jax.numpy_dtype_promotion("standard"):
        expected = by_hand(WANT_THE_LOSS[name]())
    for tx in (WANT_THE_LOSS[name](), lk.partition(WANT_THE_LOSS[name](), PLAN)):
        assert losses(tx)[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_line_search_measures_the_whole_batch(maker):
    """Not one micro-batch's or device's part of it: values and gradients at other factors are means, too."""
    tx = lk.partition({"a": optax.sgd(0.1), "b": optax.lbfgs()}, PLAN)
    assert losses(tx, MAKERS[maker])[0] == pytest.approx(losses(tx)[0], rel=1e-5)


def test_a_line_search_of_one_label_holds_the_others_still():
    tx = lk.partition({"a": optax.set_to_zero(), "b": optax.lbfgs()}, PLAN)
    seen, state = losses(tx, steps=4)
    np.testing.assert_array_equal(state.factors["w"].a, FACTORS["w"].a)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < 0.7 * seen[0]


def test_functions_of_the_loss_reach_those_that_want_them():
    """Sharpness-aware steps measure the gradient elsewhere: two plain steps, one up and one from there."""
    adversary, rate = 0.5, 0.1
    tx = optax.contrib.sam(optax.sgd(rate), optax.sgd(adversary), opaque_mode=True)
    grad = jax.jit(jax.grad(lambda f: loss(BASE, f, X)))
    above = jax.tree.map(lambda x, g: x + adversary * g, FACTORS, grad(FACTORS))
    expected = jax.tree.map(lambda x, g: x - rate * g, FACTORS, grad(above))
    _, state = losses(lk.partition(tx, PLAN), steps=1)
    np.testing.assert_allclose(state.factors["w"].b, expected["w"].b, atol=1e-6)


def test_signatures_that_take_less_are_given_less():
    """SAM takes no `value`, a hand-written update takes `value` alone: in chains, wrapped, and as they are."""

    def halved(grads, state, params=None, *, value):
        return jax.tree.map(lambda g: -0.5 * value * g, grads), state

    plain = optax.GradientTransformation(lambda params: (), halved)
    grads = jax.grad(lambda f: loss(BASE, f, X))(FACTORS)
    value = loss(BASE, FACTORS, X)
    for tx in (plain, lk.partition(plain, PLAN), lk.partition({"a": plain, "b": plain}, PLAN)):
        _, state = losses(tx, steps=1)
        np.testing.assert_allclose(state.factors["w"].b, FACTORS["w"].b - 0.5 * value * grads["w"].b, atol=1e-6)
    sam = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), reset_state=False)
    assert len(losses(optax.chain(optax.clip(1.0), sam))[0]) == 3


def test_what_a_step_lacks_is_named():
    tx = optax.GradientTransformationExtraArgs(lambda p: (), lambda g, s, p=None, *, hessian: (g, s))
    for one in (tx, lk.partition(tx, PLAN)):
        with pytest.raises(lk.LoraxError, match=r"needs 'hessian', which a step .*\n  a step passes .*value_fn"):
            losses(one, steps=1)


def keeper():
    """The starting point within the state, as L2-SP has it."""

    def update(grads, start, params):
        return jax.tree.map(lambda g, p, s: -0.1 * (g + 0.5 * (p - s)), grads, params, start), start

    return optax.GradientTransformation(lambda params: params, update)


ALIASES = {
    "L2-SP": keeper,
    "twice": lambda: optax.chain(keeper(), keeper()),
    "prodigy": lambda: optax.contrib.prodigy(1.0),
    "sam": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05)),
}


@pytest.mark.parametrize("name", ALIASES)
def test_no_buffer_of_the_state_is_donated_twice(name):
    tx = lk.partition(ALIASES[name](), PLAN)
    expected = losses(tx, lambda loss, tx: lk.make_step(loss, tx, jit=False))[0]
    init, _ = lk.make_step(loss, tx)
    for state in (init(FACTORS), jax.jit(init)(FACTORS)):
        places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
        assert len(set(places)) == len(places)
    for make in (lk.make_step, MAKERS["mesh"]):
        assert losses(tx, make)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("setting", [lk.LoRA(rank=2), lk.LoRA(rank=2, start="pissa"), lk.DoRA(rank=2)])
def test_an_optimiser_that_means_something_by_none_sees_none_in_no_leaf(setting):
    """GaLore projects no leaf whose place holds None; LoRA's a0 and b0 are None where its start needs none."""
    plan = lk.resolve(lk.Spec({"w": setting}), PARAMS, FN, X)
    base, factors = lk.split(PARAMS, plan, jax.random.key(0))
    adapted = lk.adapt(FN, plan)
    grads = jax.grad(lambda f: jnp.mean((adapted(base, f, X) - 1) ** 2))(factors)
    galore = optax.contrib.galore(1e-2, rank=1)
    trained = {name: getattr(factors["w"], name) for name in ("a", "b")}
    with jax.numpy_dtype_promotion("standard"):
        seen = {name: getattr(grads["w"], name) for name in trained}
        expected, _ = galore.update(seen, galore.init(trained), trained)
    tx = lk.partition(galore, plan)
    updates, _ = tx.update(grads, tx.init(factors), factors)
    assert jax.tree.structure(updates) == jax.tree.structure(factors)
    for name, x in expected.items():
        np.testing.assert_allclose(getattr(updates["w"], name), x, atol=1e-6)


def test_what_no_optimiser_of_factors_can_be_is_said_in_words():
    lookahead = optax.lookahead(optax.sgd(0.1), 3, 0.5)
    for tx in (lookahead, lk.partition(lookahead, PLAN)):
        with pytest.raises(lk.LoraxError, match=r"optax\.lookahead wants params of its own"):
            losses(tx, steps=1)
    with pytest.raises(lk.LoraxError, match=r"takes no tree with None in it .*\n  lk\.partition\(tx, plan\) hides"):
        losses(optax.contrib.galore(1e-2, rank=1), steps=1)
    for tx in (None, optax.sgd, {"a": optax.sgd(0.1), "b": 1}):
        with pytest.raises(lk.LoraxError, match=r"it must be an optax transformation"):
            lk.partition(tx, PLAN)
        with pytest.raises(lk.LoraxError, match=r"tx is .*; it must be an optax transformation"):
            lk.make_step(loss, tx)
    for clip in ("1", True, [1.0], float("inf"), 0):
        with pytest.raises(lk.PlanError, match="it must be a positive number, or None"):
            lk.partition(optax.sgd(0.1), PLAN, clip=clip)
    for accumulate in ("2", None, 2.0, True, [2], 0):
        with pytest.raises(lk.LoraxError, match="it must be an integer of at least 1"):
            lk.make_step(loss, optax.sgd(0.1), accumulate=accumulate)
