"""Devices draw their own randomness, and gradients over devices are means, however the step is spread."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import lorax_kit as lk

ROWS = jnp.ones((8, 16))
PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 5)), jnp.float32)}


def linear(p, x):
    return x @ p["w"]


def spread(fn, **options):
    return jax.shard_map(fn, mesh=lk.device_mesh(), **options)


def over_batch(check_vma):
    def fn(p, x):
        specs = {"in_specs": (P(), P("data")), "out_specs": P("data"), "check_vma": check_vma}
        return spread(lambda w, x: x @ w, **specs)(p["w"], x)

    return fn


def adapted(fn=linear):
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2, dropout=0.5)}), PARAMS, fn, ROWS)
    base, factors = lk.split(PARAMS, plan, jax.random.key(0))
    return lk.adapt(fn, plan), base, {"w": factors["w"]._replace(b=jnp.ones_like(factors["w"].b))}


def step_over_shard_map(loss, tx):
    init, step = lk.make_step(loss, tx, axis_name="data", jit=False)
    return init, jax.jit(spread(step, in_specs=(P(), P(), P("data")), out_specs=(P(), P())))


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)], ids=["typed", "raw"])
@pytest.mark.parametrize(("make", "axis"), [(lk.pmap_step, "devices"), (step_over_shard_map, "data")])
def test_every_device_draws_masks_of_its_own(make, axis, key):
    """Rows that are all alike give outputs that are alike only where masks are."""
    run, base, factors = adapted()

    def loss(base, f, x, key):
        y, drawn = run(base, f, x, dropout_key=key), jax.random.normal(key, (3,))
        # Of all devices, as a sum that keeps each in its place: pmap's outputs must be the same everywhere.
        place = jax.nn.one_hot(jax.lax.axis_index(axis), 4)
        return jnp.mean(y), {"y": place[:, None, None] * y[None], "drawn": place[:, None] * drawn[None]}

    init, step = make(loss, optax.sgd(0.0))
    _, info = step(init(factors, key), base, ROWS)
    for x in info.aux.values():
        assert len({row.tobytes() for row in np.asarray(x)}) == 4


@pytest.mark.parametrize("check_vma", [True, False])
def test_blocks_of_a_shard_map_have_masks_of_their_own(check_vma):
    run, base, factors = adapted(over_batch(check_vma))
    y = jax.jit(lambda f, key: run(base, f, ROWS, dropout_key=key))(factors, jax.random.key(1))
    assert len({block.tobytes() for block in np.asarray(y).reshape(4, 2, 5)}) == 4
    # Inverted dropout: over many masks the mean is the value without it.
    keys = jax.random.split(jax.random.key(2), 400)
    mean = jax.jit(lambda f: jnp.mean(jax.lax.map(lambda k: run(base, f, ROWS, dropout_key=k), keys), 0))(factors)
    np.testing.assert_allclose(mean, run(base, factors, ROWS), atol=0.4)


def test_the_same_inputs_on_devices_that_split_the_outputs_have_one_mask():
    """Tensor-parallel: each device holds some outputs of the same rows, of which one mask drops the same inputs."""

    def fn(p, x):
        return spread(lambda w, x: x @ w, in_specs=(P(None, "data"), P()), out_specs=P(None, "data"))(p["w"], x)

    params = {"w": jnp.zeros((16, 8))}
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1, dropout=0.5)}), params, fn, ROWS)
    base, _ = lk.split(params, plan, jax.random.key(0))
    factors = {"w": lk.Factors(jax.random.normal(jax.random.key(1), (1, 16)), jnp.ones((1, 8)))}
    y = np.asarray(jax.jit(lambda f: lk.adapt(fn, plan)(base, f, ROWS, dropout_key=jax.random.key(0)))(factors))
    np.testing.assert_array_equal(y, np.repeat(y[:, :1], 8, 1))
    assert np.ptp(y[:, 0]) > 0


def test_gradients_over_a_shard_map_are_means():
    """Its autodiff sums the gradients of what all devices share: averaged again, they would be four times too large."""
    x = np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), PARAMS, linear, x)
    base, factors = lk.split(PARAMS, plan, jax.random.key(0))
    run = lk.adapt(linear, plan)

    def loss(base, f, x):
        return jnp.mean((run(base, f, x) - 1) ** 2)

    expected = jax.grad(lambda f: loss(base, f, x))(factors)
    for make in (step_over_shard_map, lk.pmap_step):
        init, step = make(loss, optax.sgd(1.0))
        state, info = step(init(factors), base, x)
        np.testing.assert_allclose(state.factors["w"].b, factors["w"].b - expected["w"].b, atol=1e-5)
        assert float(info.grad_norm) == pytest.approx(float(optax.tree.norm(expected)), rel=1e-5)
