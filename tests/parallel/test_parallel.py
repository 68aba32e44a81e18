"""One device, a data mesh and pmap: the same training, each compiled once."""

import chex
import jax
import numpy as np
import optax
import pytest

import lorax_kit as lk
from tests import tiny

PROBLEM = tiny.problem()
GRID = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def train(make, placed=lambda base: base, **options):
    batch = next(tiny.stream(0, 0))
    spec = lk.Spec({"head/{kernel,bias}": lk.Full(), "{up,down}/kernel": lk.LoRA(rank=2)})
    params = tiny.params(jax.random.key(0))
    plan = lk.resolve(spec, params, tiny.apply, batch)
    base, factors = lk.split(params, plan, jax.random.key(1))
    adapted = lk.adapt(tiny.apply, plan)
    chex.clear_trace_counter()

    def loss(base, f, b):
        return PROBLEM.loss(adapted(base, f, b), b)

    loss.__name__ = make.__name__
    counted = chex.assert_max_traces(loss, n=1)
    init, step = make(counted, lk.partition(optax.adamw(1e-2), plan, clip=1.0), **options)
    state, losses, base = init(factors), [], placed(base)
    batches = tiny.stream(0, 0)
    for _ in range(20):
        state, info = step(state, base, next(batches))
        losses.append(float(info.loss))
    return state, losses


@pytest.fixture(scope="module")
def single():
    return train(lk.make_step)


def split(factors="replicated", **axes):
    """Training on a mesh, the base in parts."""
    mesh = lk.training_mesh(**axes)
    rules = {"up/kernel": ("tensor", None), "down/kernel": (None, "tensor")}

    def placed(base):
        where = lk.layout(base, mesh, rules if mesh.shape["tensor"] > 1 else None, smallest=1)
        return lk.place(base, where)

    return train(lk.sharded_step, placed, mesh=mesh, factors=factors)


@pytest.mark.parametrize(
    "other",
    [
        lambda: train(lk.sharded_step, mesh=lk.device_mesh()),
        lambda: train(lk.sharded_step, mesh=lk.device_mesh(devices=jax.devices()[:2])),
        lambda: train(lk.sharded_step, mesh=lk.device_mesh("batch")),
        lambda: train(lk.sharded_step, mesh=GRID),
        lambda: train(lk.sharded_step, mesh=GRID, axis="model"),
        lambda: split(fsdp=4),
        lambda: split(data=2, fsdp=2, factors="sharded"),
        lambda: split(data=2, tensor=2),
        lambda: split(fsdp=2, tensor=2),
        lambda: train(lk.pmap_step),
        lambda: train(lk.pmap_step, devices=jax.devices()[:2]),
    ],
    ids=[
        *("mesh of 4", "mesh of 2", "axis batch", "2 x 2", "2 x 2 by model", "fsdp", "data, fsdp, sharded factors"),
        *("data, tensor", "fsdp, tensor", "pmap over 4", "pmap over 2"),
    ],
)
def test_equal_to_one_device_after_20_steps_with_one_trace(single, other):
    assert len(jax.devices()) == 4
    state, losses = other()
    # Gradients are summed over devices in another order.
    np.testing.assert_allclose(losses, single[1], atol=1e-5)
    chex.assert_trees_all_close(jax.device_get(state.factors), jax.device_get(single[0].factors), atol=1e-5)
    assert losses[-1] != pytest.approx(losses[0], abs=1e-3)


def test_the_batch_is_split_and_the_state_replicated():
    mesh = lk.device_mesh()
    from lorax_kit.parallel import replicate, shard

    batch = shard(next(tiny.stream(0, 0)), mesh)
    assert {s.data.shape for s in batch.x.addressable_shards} == {(4, 6)}
    whole = replicate(tiny.params(jax.random.key(0)), mesh)
    assert {s.data.shape for s in whole["up"]["kernel"].addressable_shards} == {(8, 9)}


@pytest.mark.parametrize("make", [lk.sharded_step, lk.pmap_step])
def test_a_batch_that_does_not_divide_says_so(make):
    options = {"mesh": lk.device_mesh()} if make is lk.sharded_step else {}
    init, step = make(lambda base, f, b: (f["w"] * b).sum(), optax.sgd(0.1), **options)
    with pytest.raises(lk.LoraxError, match="does not split over 4 devices"):
        step(init({"w": np.float32(1)}), None, np.ones((6, 2), np.float32))


def test_a_mesh_without_the_axis_says_which_it_has():
    mesh = jax.make_mesh((2, 2), ("batch", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with pytest.raises(lk.LoraxError, match=r"axes 'batch', 'model', and none is 'data'.\n  .*axis='batch'"):
        lk.sharded_step(lambda base, f, b: f["w"], optax.sgd(0.1), mesh)
