"""Weight decay pulls gains to where they started; whatever else an optimiser does is unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.training import labels
from lorax_kit.training.optimisers.gains import FromStart
from lorax_kit.training.optimisers.gains import from_start as from_start_of
from tests.draws import draw

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {"w": draw(0, 6, 4), "v": draw(1, 4, 3)}


def setup(rules=None):
    plan = lk.resolve(lk.Spec(rules or {"w": lk.DoRA(rank=2), "v": lk.IA3()}), PARAMS)
    _, factors = lk.split(PARAMS, plan, jax.random.key(0))
    return plan, factors


def stepped(tx, factors, grads, steps=3):
    state = tx.init(factors)

    @jax.jit
    def step(factors, state):
        updates, state = tx.update(grads, state, factors)
        return optax.apply_updates(factors, updates), state

    for _ in range(steps):
        factors, state = step(factors, state)
    return factors


def test_decay_without_gradients_leaves_gains_where_they_are():
    plan, factors = setup()
    after = stepped(
        lk.partition(optax.adamw(0.1, weight_decay=0.1), plan), factors, jax.tree.map(jnp.zeros_like, factors)
    )
    np.testing.assert_array_equal(after["w"].magnitude, factors["w"].magnitude)
    np.testing.assert_array_equal(after["v"].gain, factors["v"].gain)
    np.testing.assert_allclose(after["w"].a, (1 - 0.01) ** 3 * factors["w"].a, rtol=1e-6)  # as ever


def test_decay_pulls_gains_that_moved_back_to_their_start():
    plan, factors = setup()
    tx = lk.partition(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0)), plan)
    state, zero = tx.init(factors), jax.tree.map(jnp.zeros_like, factors)
    moved = factors["w"]._replace(magnitude=factors["w"].magnitude + 0.5)
    updates, _ = tx.update(zero, state, factors | {"w": moved})
    np.testing.assert_allclose(updates["w"].magnitude, jnp.full(4, -0.25), rtol=1e-6)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(0.1, weight_decay=0.0),
        optax.adafactor(0.1, multiply_by_parameter_scale=False),
        optax.lion(0.1, weight_decay=0.0),
        optax.contrib.schedule_free_adamw(0.1, weight_decay=0.0),
        {"a": optax.sgd(0.1), "b": optax.adam(0.1), "magnitude": optax.adam(0.3), "gain": optax.sgd(1.0)},
    ],
    ids=["adamw", "adafactor", "lion", "schedule_free", "labels"],
)
def test_without_decay_nothing_changes(tx):
    plan, factors = setup()
    grads = jax.tree.map(lambda x: draw(3, *x.shape), factors)
    whole = tx if not isinstance(tx, dict) else optax.partition(tx, labels(plan))
    for x, y in zip(
        jax.tree.leaves(stepped(lk.partition(tx, plan), factors, grads)),
        jax.tree.leaves(stepped(whole, factors, grads)),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=2e-7, atol=1e-7)


def test_plans_without_gains_keep_the_state_they_had():
    plan, factors = setup({"w": lk.LoRA(rank=2)})
    assert not isinstance(lk.partition(optax.sgd(0.1), plan).init(factors), FromStart)


def test_the_start_is_no_alias_of_the_factors():
    """A step donates both."""
    plan, factors = setup()
    state = lk.partition(optax.sgd(0.1), plan).init(factors)
    assert state.start["w"]["magnitude"].unsafe_buffer_pointer() != factors["w"].magnitude.unsafe_buffer_pointer()


def test_functions_among_extra_arguments_see_the_factors_as_they_are():
    """What a line search measures is the loss at the factors, not at deviations."""
    plan, factors = setup({"v": lk.IA3()})
    seen = {}

    def update(grads, state, params, *, value_fn):
        seen.update(params=params["v"].gain, value=value_fn(params))
        return grads, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    from_start = from_start_of(inner, plan)
    state = from_start.init(factors)
    from_start.update(factors, state, factors, value_fn=lambda f: jnp.sum(f["v"].gain))
    np.testing.assert_array_equal(seen["params"], np.zeros(3))
    assert float(seen["value"]) == 3
