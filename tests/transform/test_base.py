"""The three kinds of base do the same, each its own way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.tree_util import Partial

import lorax_kit as lk
from lorax_kit.core.lowrank import LowRank
from lorax_kit.transform import compressed
from lorax_kit.transform.base import Dense, Empty, Restored, base_of, combined
from tests.draws import draw, moved


def bases(*shape):
    w = draw(0, *shape)
    return [Dense(w), Empty(jnp.zeros(shape)), base_of(lk.quantize({"w": w}, ["w"], "int8", block=2)["w"])]


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_changed_base_is_multiplied_as_the_changed_array(kind):
    base = bases(4, 6)[kind]
    x, turned = draw(1, 3, 6), base.changed(Partial(lambda s, w: s * w.T, jnp.float32(3)))
    want = x @ (3 * np.asarray(base.array())).T
    for kernel in ("auto", "plain"):
        y, dx = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(turned.dot(Partial(lambda w, x: x @ w), x, kernel))))(x)  # noqa: B023
        np.testing.assert_allclose(y, np.sin(want).sum(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dx, np.cos(want) @ (3 * np.asarray(base.array())), rtol=1e-5, atol=1e-5)
    assert (turned.shape, turned.dtype) == ((6, 4), jnp.float32)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("fill", [None, 2.0])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_entries_looked_up_are_those_of_the_array(kind, fill, axis):
    base, at = bases(5, 6)[kind], jnp.asarray([4, 0, 9])
    mode = "clip" if fill is None else "fill"
    take = Partial(lambda w: jnp.take(w, at, axis=axis, mode=mode, fill_value=fill))
    picked = base.entries(take, axis, at if axis == 0 else None, fill)
    np.testing.assert_array_equal(picked.array(), take(base.array()))
    assert isinstance(picked, Empty) == (kind == 1 and fill is None)


def test_looked_up_products_out_of_bounds_are_what_fills():
    """Matrices of a compressed stack: of no such matrix, every entry is what fills."""
    stack = LowRank(
        a=jnp.ones((1, 4, 3)), b=jnp.ones((1, 4, 5)), shape=(4, 3, 5), dtype=jnp.float32, inputs=(1,), outputs=(2,),
        stack=(0,),
    )  # fmt: skip
    for fill in (2.0, None):
        at = jnp.asarray([0, 9])
        fn = lambda p, x: jnp.einsum("bd,bde->be", x, jnp.take(p["s"], at, axis=0, mode="fill", fill_value=fill))  # noqa: B023, E731
        y = compressed(fn)({"s": stack}, jnp.ones((2, 3)))
        np.testing.assert_array_equal(y, fn({"s": stack.restore()}, jnp.ones((2, 3))))


@pytest.mark.parametrize("setting", [lk.IA3(), lk.DoRA(rank=1)])
def test_rows_out_of_bounds_that_are_masked_have_no_gradient(setting):
    params, at = {"t": draw(0, 4, 3)}, jnp.asarray([0, 9])
    fn = lambda p, i: jnp.where((i < 4)[:, None], jnp.take(p["t"], i, axis=0), 0.0)  # noqa: E731
    plan = lk.resolve(lk.Spec({"t": setting}), params, fn, at)
    base, factors = lk.split(params, plan, jax.random.key(0))
    ours = jax.grad(lambda f: jnp.sum(jnp.sin(lk.adapt(fn, plan)(base, f, at))))(factors)
    theirs = jax.grad(lambda f: jnp.sum(jnp.sin(fn(lk.merge(base, f, plan), at))))(factors)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [{"u": lk.LoRA(rank=1)}, {"w": lk.IA3()}])
def test_a_weight_without_rows_is_stacked_with_an_array(spec):
    params = {"w": jnp.ones((3, 4)), "v": jnp.ones((3, 4)), "u": jnp.ones((4, 2))}
    fn = lambda p, x: jnp.einsum("bd,gde->be", x, jnp.stack([p["w"], p["v"]])) @ p["u"]  # noqa: E731
    plan = lk.resolve(lk.Spec(spec), params, fn, jnp.ones((1, 3)))
    base, factors = lk.split(params, plan, jax.random.key(0))
    held = lk.quantize(base, ["w"], "int8", block=4) if "u" in spec else base
    np.testing.assert_allclose(lk.adapt(fn, plan)(held, factors, jnp.ones((1, 3))), [[24.0, 24.0]], rtol=1e-5)


def test_rows_of_a_quantised_table_keep_its_dtype():
    base = base_of(lk.quantize({"w": jnp.ones((4, 6), jnp.bfloat16)}, ["w"], "int8", block=2)["w"])
    take = Partial(lambda w: jnp.take(w, jnp.asarray([0, 9]), axis=0, mode="fill", fill_value=0))
    assert base.entries(take, 0, jnp.asarray([0, 9]), np.float32(0)).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_scan_over_layers_sees_each_layer(kind):
    base = bases(3, 4, 6)[kind]
    cut, given = base.layers()
    _, seen = lax.scan(lambda c, now: (c, (given if now is None else now).array()), 0, cut, length=3)
    np.testing.assert_allclose(seen, base.array(), rtol=1e-6)


def test_only_a_sum_of_empty_bases_is_empty():
    dense, empty, restored = bases(2, 2)
    assert isinstance(restored, Restored)
    w = jnp.zeros((2, 2))
    assert type(combined(w, [empty, empty])) is Empty
    assert type(combined(w, [empty, dense])) is type(combined(w, [restored])) is Dense


def test_a_quantised_parameter_that_a_recomputed_block_makes_has_its_gradient():
    """Tiled between two products: what the block keeps is a weight, whose functions differ each time it is made."""
    params, x = {"w": draw(0, 3, 4), "u": draw(1, 4, 4)}, draw(2, 5, 6)
    fn = lambda p, x: jnp.tanh(jnp.tanh(x) @ jnp.tile(p["w"], (2, 1))) @ p["u"]  # noqa: E731
    plan = lk.resolve(lk.Spec({"*": lk.LoRA(rank=1)}), params, fn, x)
    base, factors = lk.split(params, plan, jax.random.key(0))
    base = lk.quantize(base, ["w"], "int8", block=2)
    ours, theirs = (
        jax.grad(lambda f: jnp.sum(adapted(base, f, x)))(moved(factors))  # noqa: B023
        for adapted in (lk.adapt(fn, plan), lk.adapt(fn, plan, recompute=False))
    )
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)
