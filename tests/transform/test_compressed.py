"""`compressed`: low-rank params in every use of tests/transform/uses.py, against the function of the restored ones."""

import jax
import jax.numpy as jnp
import pytest

import lorax_kit as lk
from lorax_kit.core.lowrank import LowRank, dense
from lorax_kit.transform import compressed
from tests.draws import draw
from tests.transform.test_coverage import close, loss_and_outputs, prepare
from tests.transform.uses import CASES


def lowrank(site, factors, residual=None):
    axes = {"inputs": site.axes.inputs, "outputs": site.axes.outputs, "stack": site.axes.stack}
    return LowRank(a=factors.a, b=factors.b, residual=residual, shape=site.shape, dtype=jnp.float32, **axes)


def restored(params):
    return jax.tree.map(dense, params, is_leaf=lambda x: isinstance(x, LowRank))


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_function_of_the_restored_with_gradients(name, residual):
    case, plan, base, factors = prepare(name)
    small = {**case.params}
    for site in plan.sites:
        small[site.path] = lowrank(site, factors[site.path], base[site.path] if residual else None)
    fn = compressed(case.fn)
    if case.materialised:
        with pytest.raises(lk.PlanError, match="is low-rank, and the function needs it whole"):
            fn(small, *case.inputs)
        return
    ours = loss_and_outputs(lambda p: fn(p, *case.inputs), name != "while")
    theirs = loss_and_outputs(lambda p: case.fn(restored(p), *case.inputs), name != "while")
    close(jax.jit(ours)(small), jax.jit(theirs)(small), case.bits)


def matrix(rank, k=64, n=48):
    a, b = (draw(i, rank, size) for i, size in enumerate((k, n)))
    return LowRank(a=a, b=b, shape=(k, n), dtype=jnp.float32)


def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_a_product_runs_as_two_thin_ones_also_under_a_scan_of_layers():
    x = jnp.ones((32, 64))
    assert flops(compressed(lambda p, x: x @ p["w"]), {"w": matrix(4)}, x) <= 2 * 32 * 4 * (64 + 48) + 2 * 32 * 64

    layers = jax.tree.map(lambda *xs: jnp.stack(xs, 1), *[matrix(4, 64, 64)] * 8)
    layers = LowRank(
        a=layers.a, b=layers.b, shape=(8, 64, 64), dtype=jnp.float32, inputs=(1,), outputs=(2,), stack=(0,)
    )

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    memory = jax.jit(compressed(fn)).lower({"w": layers}, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 8 * 64 * 64  # no dense layers


def test_factors_are_params_of_their_own():
    small, x = {"w": matrix(6), "bias": jnp.zeros((1, 48))}, draw(2, 5, 64)
    fn = compressed(lambda p, x: x @ p["w"] + p["bias"])
    assert list(lk.paths(small)) == ["bias", "w/a", "w/b"]
    for path in ("w/a", "w/b"):
        plan = lk.resolve(lk.Spec({path: lk.LoRA(rank=2)}), small, fn, x)
        base, factors = lk.split(small, plan, jax.random.key(3))
        tuned = jax.tree.map(lambda f: f + 0.1, factors)
        merged = lk.merge(base, tuned, plan)
        assert isinstance(merged["w"], LowRank)
        assert merged["w"].rank == 6
        adapted = lk.adapt(fn, plan)
        assert jnp.allclose(adapted(base, tuned, x), fn(merged, x), rtol=1e-4, atol=1e-3)
        assert "factored" in str(lk.explain(adapted, base, tuned, x))


def test_padding_that_is_not_zero():
    fn, x = lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (0, 2)), constant_values=1.0), jnp.ones((5, 64))
    small = {"w": matrix(4)}
    assert jnp.allclose(compressed(fn)(small, x), fn(restored(small), x), rtol=1e-4, atol=1e-3)


def test_a_quantised_residual_and_quantised_factors():
    w = matrix(6)
    rest = lk.quantize({"r": 0.1 * draw(4, 64, 48)}, ["r"], "int8")["r"]
    x = draw(2, 5, 64)
    fn = compressed(lambda p, x: x @ p["w"])
    for small in (
        {"w": LowRank(a=w.a, b=w.b, residual=rest, shape=w.shape, dtype=w.dtype)},
        lk.quantize({"w": w}, ["w/*"], "int8"),
    ):
        assert jnp.allclose(fn(small, x), x @ restored(small)["w"], rtol=1e-4, atol=1e-3)


def test_a_lookup_reads_no_table_of_zeros():
    """An exporter would keep one; rows out of bounds are filled as those of the table itself."""
    small = {"w": matrix(3)}
    ids = jnp.asarray([[0, 63], [64, 5]])
    fn = lambda p, ids: jnp.take(p["w"], ids, axis=0, fill_value=7)  # noqa: E731
    jaxpr = jax.make_jaxpr(compressed(fn))(small, ids)
    read = [e.invars[0].aval.size for e in jaxpr.jaxpr.eqns if e.primitive.name == "gather"]
    assert max(read) == 3 * 64
    close(compressed(fn)(small, ids), fn(restored(small), ids), 17)
