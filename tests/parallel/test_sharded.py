"""A base in parts: where its arrays lie, what crosses the network, and the randomness of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorax_kit as lk
from lorax_kit.core.lowrank import LowRank
from lorax_kit.measure import collective_bytes
from lorax_kit.models import load_model
from lorax_kit.parallel import device_bytes, replicate, shard
from tests.draws import draw, moved
from tests.models.llama_files import write_folder

PARAMS = {"layer_0": {"mlp": {"up": {"kernel": draw(0, 16, 64)}, "down": {"kernel": draw(1, 64, 16)}}}}
X = draw(2, 8, 16)
ABSTRACT = jax.sharding.AbstractMesh((2, 2), ("fsdp", "tensor"))


def model(p, x):
    mlp = p["layer_0"]["mlp"]
    return jnp.tanh(x @ mlp["up"]["kernel"]) @ mlp["down"]["kernel"]


def setting(dropout=0.0, params=PARAMS):
    plan = lk.resolve(lk.Spec({"**/kernel": lk.LoRA(rank=2, dropout=dropout)}), params, model, X)
    base, factors = lk.split(params, plan, jax.random.key(0))
    run = lk.adapt(model, plan)
    if dropout:
        return (lambda b, f, x, key: jnp.mean(run(b, f, x, dropout_key=key) ** 2)), plan, base, moved(factors)
    return (lambda b, f, x: jnp.mean(run(b, f, x) ** 2)), plan, base, moved(factors)


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(list(tree) if not isinstance(tree, dict) else tree))


def close(ours, theirs):
    for g, h in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(g, h, atol=1e-5)


def test_a_layout_follows_rules_and_splits_the_rest_by_size():
    mlp = lk.layout(PARAMS, ABSTRACT)["layer_0"]["mlp"]
    assert mlp["up"]["kernel"].spec == P("fsdp", "tensor")
    assert mlp["down"]["kernel"].spec == P("tensor", "fsdp")
    assert device_bytes(PARAMS, lk.layout(PARAMS, ABSTRACT)) == nbytes(PARAMS) / 4
    # Another function than the model's: too small, odd, and one axis split by both.
    others = {"small": draw(0, 8), "odd": draw(0, 33, 35), "tall": draw(0, 1024, 3), "n": 3}
    found = lk.layout(others, ABSTRACT, {"tall": ("tensor", None)})
    assert (found["small"].spec, found["odd"].spec) == (P(None), P(None, None))
    assert found["tall"].spec == P(("tensor", "fsdp"), None)
    assert found["n"] is None


def test_codes_and_products_are_split_as_their_parameters():
    base = lk.quantize(PARAMS, ["**/up/kernel"], "nf4", block=16)
    up = lk.layout(base, ABSTRACT, smallest=256)["layer_0"]["mlp"]["up"]["kernel"]
    assert (up.codes.spec, up.scales.spec, up.log_step.spec) == (P("fsdp", "tensor"), P(None, "tensor"), P(None, None))
    product = LowRank(a=draw(0, 4, 16), b=draw(1, 4, 64), residual=draw(2, 16, 64), shape=(16, 64), dtype=np.float32)
    low = lk.layout({"w": product}, ABSTRACT, {"w": (None, "tensor")}, smallest=128)["w"]
    assert (low.a.spec, low.b.spec, low.residual.spec) == (P(None, None), P("fsdp", "tensor"), P("fsdp", "tensor"))


@pytest.mark.parametrize(
    ("rules", "error", "says"),
    [
        ({"**/up/kernal": ("tensor", None)}, lk.PlanError, "'**/up/kernal' matches no parameter to split"),
        ({"**/up/kernel": ("model", None)}, lk.LoraxError, "the axis 'model'; the mesh has 'fsdp', 'tensor'"),
        ({"**/up/kernel": ("tensor",)}, lk.LoraxError, "its rule ('tensor',) is for 1 axes"),
    ],
)
def test_rules_that_do_not_hold_are_errors(rules, error, says):
    with pytest.raises(error) as e:
        lk.layout(PARAMS, ABSTRACT, rules)
    assert says in str(e.value)


def test_devices_that_no_rule_uses_are_an_error():
    with pytest.raises(lk.LoraxError, match=r"2 devices along 'tensor'.*\n  rules=\{"):
        lk.layout({"w": draw(0, 4, 4)}, ABSTRACT)
    with pytest.raises(lk.LoraxError, match="'w' of shape \\(3, 4\\) does not split over 2 devices along its axis 0"):
        lk.layout({"w": draw(0, 3, 4)}, ABSTRACT, {"w": ("tensor", None)})
    with pytest.raises(lk.LoraxError, match="a mesh of 4 x 2 x 1 devices needs 8; there are 4"):
        lk.training_mesh(4, 2)
    with pytest.raises(lk.LoraxError, match="factors is 'split'; it is 'replicated' or 'sharded'"):
        lk.sharded_step(lambda b, f, x: f, optax.sgd(1.0), lk.training_mesh(4), factors="split")


def test_only_gradients_of_factors_cross_the_network_and_the_base_is_gathered():
    loss, plan, base, factors = setting()
    for mesh in (lk.training_mesh(data=4), lk.training_mesh(fsdp=4)):
        init, step = lk.sharded_step(loss, lk.partition(optax.adam(1e-2), plan), mesh)
        parts = mesh.shape["fsdp"] > 1
        placed = lk.place(base, lk.layout(base, mesh)) if parts else replicate(base, mesh)
        program = step.lower(init(factors), placed, shard(X, mesh, ("data", "fsdp")))
        across = collective_bytes(program.compile())
        gathered = nbytes(base) if parts else 0
        assert gathered <= across <= gathered * 2 + 1.05 * nbytes(factors)
        if parts:
            held = {x.addressable_shards[0].data.nbytes / x.nbytes for x in jax.tree.leaves(placed)}
            assert held == {0.25}
            # The backward pass gathers anew: what XLA may not merge stands behind a barrier.
            assert program.as_text().count("optimization_barrier") > 0


def test_parts_of_codes_are_gathered_not_restored_weights():
    quantised = lk.quantize(PARAMS, ["**/kernel"], "int8", block=16)
    loss, plan, base, factors = setting(params=quantised)
    one = lk.make_step(loss, lk.partition(optax.sgd(1e-2), plan))
    mesh = lk.training_mesh(fsdp=4)
    many = lk.sharded_step(loss, lk.partition(optax.sgd(1e-2), plan), mesh)
    placed = lk.place(base, lk.layout(base, mesh))
    across = collective_bytes(many[1].lower(many[0](factors), placed, shard(X, mesh, "fsdp")).compile())
    assert across <= 2 * nbytes(base) + 1.05 * nbytes(factors)
    close(many[1](many[0](factors), placed, X)[0].factors, one[1](one[0](factors), base, X)[0].factors)


@pytest.mark.parametrize("axes", [{"data": 4}, {"fsdp": 4}, {"data": 2, "tensor": 2}], ids=str)
def test_masks_are_those_of_one_device(axes):
    loss, plan, base, factors = setting(dropout=0.5)
    results = []
    for mesh in (lk.training_mesh(devices=jax.devices()[:1]), lk.training_mesh(**axes)):
        init, step = lk.sharded_step(loss, lk.partition(optax.sgd(1e-2), plan), mesh)
        state, _ = step(init(factors, jax.random.key(1)), lk.place(base, lk.layout(base, mesh)), X)
        results.append(jax.device_get(state.factors))
    close(*results)


def test_masks_of_pmap_are_those_of_one_device_that_takes_the_parts_one_by_one():
    loss, plan, base, factors = setting(dropout=0.5)
    results = []
    for init, step in (
        lk.make_step(loss, lk.partition(optax.sgd(1e-2), plan), accumulate=4),
        lk.pmap_step(loss, lk.partition(optax.sgd(1e-2), plan)),
        lk.pmap_step(loss, lk.partition(optax.sgd(1e-2), plan), accumulate=2, devices=jax.devices()[:2]),
    ):
        state, _ = step(init(factors, jax.random.key(1)), base, X)
        results.append(jax.device_get(state.factors))
    close(results[1], results[0])
    close(results[2], results[0])


def test_a_mesh_with_explicit_axes_gathers_too():
    loss, plan, base, factors = setting()
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Explicit,))
    results = []
    for make, place in (
        (lk.make_step, lambda base: base),
        (lambda *args: lk.sharded_step(*args, mesh), lambda base: lk.place(base, lk.layout(base, mesh))),
    ):
        init, step = make(loss, lk.partition(optax.sgd(1e-2), plan))
        results.append(jax.device_get(step(init(factors), place(base), X)[0].factors))
    close(*results)


def test_host_arrays_are_placed_part_by_part(tmp_path):
    file = tmp_path / "w.npy"
    np.save(file, np.arange(4096, dtype=np.float32).reshape(64, 64))
    mesh = lk.training_mesh(fsdp=4)
    mapped = {"w": np.load(file, mmap_mode="r"), "label": "a name"}
    placed = lk.place(mapped, lk.layout(mapped, mesh))
    assert placed["w"].sharding == NamedSharding(mesh, P("fsdp", None))
    np.testing.assert_array_equal(placed["w"], mapped["w"])
    assert placed["label"] == "a name"


@pytest.mark.parametrize("quantised", [None, "nf4"])
def test_a_folder_is_read_onto_its_shards(tmp_path, quantised):
    write_folder(tmp_path)
    mesh, whole = lk.training_mesh(fsdp=2, tensor=2), load_model(tmp_path, quantise=quantised)
    seen, onto = [], lk.onto(mesh, smallest=8)

    def place(path, x):
        seen.append(all(isinstance(part, np.ndarray) for part in jax.tree.leaves(x)))
        return onto(path, x)

    parted = load_model(tmp_path, quantise=quantised, place=place).params
    assert len(seen) == len(lk.paths(whole.params))
    assert sum(seen) >= len(seen) / 4  # host arrays, but for what was quantised
    where = lk.layout(whole.params, mesh, smallest=8)
    for x, y, at in zip(*map(jax.tree.leaves, (parted, whole.params, where)), strict=True):
        assert x.sharding == at
        np.testing.assert_array_equal(x, y)
    most = max(len(x.sharding.device_set) for x in jax.tree.leaves(parted))
    assert most == 4
    assert nbytes(x.addressable_shards[0].data for x in jax.tree.leaves(parted)) < 0.6 * nbytes(whole.params)


def test_scales_of_fewer_blocks_than_devices_are_whole_on_each():
    params = lk.quantize({"w": draw(0, 64, 64)}, ["w"], "nf4")
    found = lk.layout(params, ABSTRACT, {"w": (None, "tensor")})["w"]
    assert (found.codes.spec[1], found.scales.spec[1]) == ("tensor", None)


def test_an_axis_named_twice_is_an_error():
    with pytest.raises(lk.LoraxError, match=r"the rule '\*\*/up/kernel' names an axis of the mesh twice"):
        lk.layout(PARAMS, ABSTRACT, {"**/up/kernel": ("tensor", "tensor")})
    with pytest.raises(lk.LoraxError, match=r"axis is \('data', 'data'\), which names an axis twice"):
        lk.sharded_step(lambda b, f, x: f, optax.sgd(1.0), lk.training_mesh(4), axis=("data", "data"))


def test_a_base_in_parts_on_another_mesh_is_not_moved_in_silence():
    loss, plan, base, factors = setting()
    mesh, other = lk.training_mesh(fsdp=4), lk.training_mesh(fsdp=4, devices=jax.devices()[::-1])
    init, step = lk.sharded_step(loss, lk.partition(optax.sgd(1e-3), plan), mesh)
    with pytest.raises(lk.LoraxError, match=r"in parts on another mesh.*\n  place it on this one: lk\.place"):
        step(init(factors), lk.place(base, lk.layout(base, other, smallest=1)), X)
    results = [step(init(factors), there, X)[1].loss for there in (base, replicate(base, other))]
    assert float(results[0]) == pytest.approx(float(results[1]), rel=1e-6)
