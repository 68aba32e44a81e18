"""Meshes with explicit axes, as `jax.make_mesh` has them: the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorax_kit as lk
from lorax_kit.arrays.after import after
from lorax_kit.models.layers import attention
from tests.draws import draw, moved

MESH = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
PARAMS, X, IDS = {"w": draw(0, 8, 8), "v": draw(2, 8, 8)}, draw(1, 4, 3, 8), jnp.arange(8).reshape(4, 2)


def on_mesh():
    return bool(jax.sharding.get_abstract_mesh().axis_names)


def whole():
    """What a function says of an ambiguous result on a mesh."""
    return {"out_sharding": P()} if on_mesh() else {}


def gathered(x):
    return jax.sharding.reshard(x, P()) if on_mesh() else x


def one(x, w):
    return jnp.einsum("bti,io->bto", x, w)


def convolved(x, w):
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def heads(x):
    return x.reshape(4, 3, 2, 4).transpose(0, 2, 1, 3)


# name -> (function, how the parameter w lies).
USES = {
    "product": (lambda p, x: one(x, p["w"]), P()),
    "inputs split": (lambda p, x: jnp.einsum("bi,io->bo", gathered(x)[:, 0], p["w"], **whole()), P("data")),
    "outputs split": (lambda p, x: one(gathered(x), p["w"]), P(None, "data")),
    "two layers": (lambda p, x: one(jax.nn.gelu(one(x, p["w"])), p["v"]), P()),
    "one input": (lambda p, x: one(x, p["w"]) * one(x, p["v"]), P()),
    "transposed": (lambda p, x: one(x, p["w"].T), P()),
    "scaled": (lambda p, x: one(x, p["w"] * jnp.arange(8.0)[None]), P()),
    "joined": (lambda p, x: one(x, jnp.concatenate([p["w"], p["v"]], 1)), P()),
    "reshaped": (lambda p, x: jnp.einsum("bti,ihk->bthk", x, p["w"].reshape(8, 2, 4)), P()),
    "materialised": (lambda p, x: one(x, jnp.tanh(p["w"])), P()),
    "materialised, split": (lambda p, x: one(gathered(x), jnp.tanh(p["w"])), P(None, "data")),
    "looped": (lambda p, x: lax.scan(lambda h, _: (jnp.tanh(one(h, p["w"])), None), x, None, length=2)[0], P()),
    "rematerialised": (lambda p, x: jax.checkpoint(lambda x, w: jnp.sin(one(x, w)))(x, p["w"]), P()),
    "branches": (lambda p, x: lax.cond(p["v"][0, 0] > 9, lambda w: one(x, w), lambda w: 2 * one(x, w), p["w"]), P()),
    "attention": (lambda p, x: attention(heads(one(x, p["w"])), heads(x), heads(x), jnp.ones((4, 1, 1, 3), bool)), P()),
    "rows": (lambda p, x: p["w"].at[IDS].get(**whole()), P()),
    "convolution": (lambda p, x: convolved(x, p["w"][None]), P()),
}  # fmt: skip


@pytest.mark.parametrize("method", [lk.LoRA, lk.DoRA])
@pytest.mark.parametrize("use", USES)
def test_values_and_gradients_are_those_of_one_device(use, method):
    fn, where = USES[use]
    spec = lk.Spec({"{w,v}" if use in ("two layers", "one input", "joined") else "w": method(rank=2)})
    plan = lk.resolve(spec, PARAMS, fn, X)
    base, start = lk.split(PARAMS, plan, jax.random.key(0))
    factors = moved(start)

    def loss(base, f, x):
        return jnp.sum(jnp.sin(lk.adapt(fn, plan)(base, f, x)))

    value, grads = jax.jit(jax.value_and_grad(loss, 1))(base, factors, X)
    with jax.set_mesh(MESH):
        placed = lambda x, spec: jax.device_put(x, NamedSharding(MESH, spec))  # noqa: E731
        there, x = {"w": placed(PARAMS["w"], where), "v": placed(PARAMS["v"], P())}, placed(X, P("data"))
        assert lk.resolve(spec, there, fn, x) == plan
        again = lk.split(there, plan, jax.random.key(0))[1]
        for g, h in zip(jax.tree.leaves(again), jax.tree.leaves(start), strict=True):
            np.testing.assert_allclose(g, h, rtol=1e-6)
        f = jax.tree.map(lambda v: placed(v, P()), factors)
        ours, theirs = jax.jit(jax.value_and_grad(loss, 1))(there, f, x)
        merged = jax.jit(lambda p: jnp.sum(jnp.sin(fn(p, x))))(lk.merge(there, f, plan))
    for other in (ours, merged):
        assert float(other) == pytest.approx(float(value), rel=1e-5, abs=1e-4)
    for g, h in zip(jax.tree.leaves(theirs), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(g, h, atol=2e-5 * max(1.0, float(jnp.abs(h).max())))


@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_sharded_steps_take_such_a_mesh(accumulate):
    """Dropout and a quantised base on the way: keys and restored weights are the library's own arrays."""
    fn, x = USES["two layers"][0], draw(3, 8, 3, 8)
    params = lk.quantize(PARAMS, ["v"], "int8")
    plan = lk.resolve(lk.Spec({"{w,v}": lk.LoRA(rank=2, dropout=0.5)}), params, fn, x)
    base, factors = lk.split(params, plan, jax.random.key(0))
    factors = moved(factors)

    def loss(base, f, x, key):
        return jnp.mean(lk.adapt(fn, plan)(base, f, x, dropout_key=key) ** 2)

    results = []
    for maker in (lk.make_step, lambda *args, **options: lk.sharded_step(*args, mesh=MESH, **options)):
        init, step = maker(loss, lk.partition(optax.sgd(1e-3), plan), accumulate=accumulate)
        results.append(step(init(factors, jax.random.key(1)), base, x))
    assert float(results[1][1].loss) == pytest.approx(float(results[0][1].loss), rel=1e-5)
    for g, h in zip(jax.tree.leaves(results[1][0].factors), jax.tree.leaves(results[0][0].factors), strict=True):
        np.testing.assert_allclose(g, h, atol=1e-5)


def test_an_order_of_computation_keeps_values_and_places():
    x, y = (jax.device_put(draw(i, 4, 8), NamedSharding(MESH, P("data"))) for i in (0, 1))
    with jax.set_mesh(MESH):
        later = jax.jit(lambda x, y: after(x, {"y": y, "n": jnp.int32(3)}))(x, y)
    np.testing.assert_array_equal(later["y"], y)
    assert later["y"].sharding.spec == P("data", None)
