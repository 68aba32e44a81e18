"""Sums of adapters equal the sums of their deltas: every method, every layout, fp32 and x64, and back from disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit import algebra
from tests.algebra.tasks import LOW, adapter, close, dense, fn, inputs, params, settings

BASE = params()
ONE, TWO = adapter(1), adapter(2, lk.LoRA(rank=3, alpha=1, rslora=True))


def weighted(adapters, weights, base=BASE):
    deltas = [dense(x, base) for x in adapters]
    return {path: sum(w * d[path] for w, d in zip(weights, deltas, strict=True)) for path in deltas[0]}


@pytest.mark.parametrize(
    ("made", "adapters", "weights"),
    [
        (lambda: algebra.scale(ONE, -0.7), [ONE], [-0.7]),
        (lambda: algebra.scale(ONE, np.float32(0.5)), [ONE], [0.5]),
        (lambda: algebra.negate(TWO), [TWO], [-1]),
        (lambda: algebra.add(ONE, TWO), [ONE, TWO], [1, 1]),
        (lambda: algebra.subtract(ONE, TWO), [ONE, TWO], [1, -1]),
        (lambda: algebra.average([ONE, TWO]), [ONE, TWO], [0.5, 0.5]),
        (lambda: algebra.average([ONE, TWO], [3, 1]), [ONE, TWO], [0.75, 0.25]),
        (lambda: algebra.concatenate([ONE, TWO], [0.3, -2]), [ONE, TWO], [0.3, -2]),
        (lambda: algebra.concatenate([ONE, TWO, ONE]), [ONE, TWO], [2, 1]),
    ],
)
def test_operations_equal_the_numpy_formula_on_dense_deltas(made, adapters, weights):
    found = made()
    close(found, BASE, weighted(adapters, weights))
    assert set(found.errors.values()) == {0.0}
    assert all(site.setting.kind == "lora" and site.scale == 1 for site in found.plan.sites)


def test_ranks_add_up_and_stop_at_the_smaller_side():
    assert [s.rank for s in algebra.add(ONE, TWO).plan.sites] == [5, 5, 5]
    assert [s.rank for s in algebra.add(ONE, TWO, ONE).plan.sites] == [5, 5, 6]  # flat 6x5, heads 5x6, layers 6x6


def test_the_factors_of_different_adapters_never_meet():
    """What a sum of A and of B would add: A_1^T B_2."""
    rows = algebra.add(ONE, TWO).factors["flat"]
    np.testing.assert_array_equal(rows.a[:2], ONE.factors["flat"].a)
    np.testing.assert_array_equal(rows.a[2:], TWO.factors["flat"].a)


@pytest.mark.parametrize("kind", settings())
def test_a_sum_with_any_method_is_exact(kind):
    other = adapter(3, settings()[kind])
    found = algebra.concatenate([ONE, other], [0.5, 2.0], base=BASE)
    close(found, BASE, weighted([ONE, other], [0.5, 2.0]))
    merged = lk.merge(BASE, found.factors, found.plan)
    for path, delta in weighted([ONE, other], [0.5, 2.0]).items():
        np.testing.assert_allclose(merged[path], np.asarray(BASE[path], np.float64) + delta, rtol=1e-4, atol=2e-5)


def test_what_is_trained_in_full_is_summed_by_value_less_base():
    one, two = adapter(1, full=True), adapter(2, full=True)
    close(algebra.concatenate([one, two], [0.25, 3], base=BASE), BASE, weighted([one, two], [0.25, 3]))


@pytest.mark.usefixtures("standard_promotion")
def test_sums_are_exact_to_1e_12_in_x64():
    with jax.enable_x64(True):
        base = params(dtype=jnp.float64)
        one, two = (
            adapter(i, s, full=True, dtype=jnp.float64) for i, s in ((1, lk.LoRA(rank=2)), (2, lk.DoRA(rank=1)))
        )
        found = algebra.concatenate([one, two], [0.3, -2.0], base=base)
        close(found, base, weighted([one, two], [0.3, -2.0], base), 1e-12)
        assert found.plan.site("flat").setting.dtype == "float64"


def test_a_small_delta_of_a_large_parameter_keeps_its_digits():
    """W' - W in fp32 would have none of them."""
    large = BASE | {"flat": 1e6 * BASE["flat"]}
    tiny = algebra.scale(algebra.scale(ONE, 1e-4), 1e4)
    close(tiny, large, dense(ONE, BASE))


def test_narrow_leaves_are_summed_wide():
    narrow = adapter(1, lk.LoRA(rank=2, dtype="bfloat16"))
    found = algebra.add(narrow, narrow)
    close(found, BASE, weighted([narrow], [2]))
    assert found.plan.site("flat").setting.dtype == "float32"


def test_the_result_runs_saves_and_loads(tmp_path):
    odd = {"a*b": {"w[0]": BASE["flat"]}, "re:x": BASE["flat"], "bias": BASE["bias"]}
    spec = lk.Spec({r"re:a\*b/.*": lk.LoRA(rank=1), "re:re:x": lk.LoRA(rank=2, inputs=(1,)), "bias": lk.Full()})
    plan = lk.resolve(spec, odd)
    base, factors = lk.split(odd, plan, jax.random.key(0))
    both = algebra.add(*(algebra.Adaptation(plan, factors),) * 2, base=base)
    found = algebra.add(ONE, TWO)
    x = inputs()
    ours = lk.adapt(fn, found.plan)(BASE, found.factors, x)
    np.testing.assert_allclose(ours, fn(lk.merge(BASE, found.factors, found.plan), x), rtol=1e-4, atol=1e-5)
    for i, (one, own) in enumerate(((found, BASE), (both, base))):
        lk.save_adapter(tmp_path / str(i), one.plan, one.factors, base=own)
        again = lk.load_adapter(tmp_path / str(i), base=own)
        assert again.plan == one.plan
        for path, leaves in one.factors.items():
            assert all(np.array_equal(p, q) for p, q in zip(leaves, again.factors[path], strict=True) if p is not None)
    again = lk.load_adapter(tmp_path / "0", base=BASE)  # an adapter from disk is one like any other
    close(algebra.negate(again), BASE, weighted([ONE, TWO], [-1, -1]))


def test_weights_may_be_traced_and_learnt():
    """d/dw of <delta_1 w_1 + delta_2 w_2, G> is <delta_i, G>."""
    flat = {"flat": adapter(1, sites=("flat",)), "other": adapter(2, lk.LoRA(rank=1), sites=("flat",))}
    g = jnp.asarray(np.random.default_rng(5).normal(size=(6, 5)), jnp.float32)

    def loss(weights):
        found = algebra.concatenate(flat.values(), list(weights))
        return jnp.sum(g * (lk.merge(BASE, found.factors, found.plan)["flat"] - BASE["flat"]))

    wanted = [float(np.sum(np.asarray(g) * dense(x, BASE)["flat"])) for x in flat.values()]
    np.testing.assert_allclose(jax.grad(loss)(jnp.array([0.5, 2.0])), wanted, rtol=1e-4)


def test_every_layout_was_there():
    axes = {s.path: (s.axes.stack, s.axes.inputs, s.axes.outputs) for s in ONE.plan.sites}
    assert axes == {"flat": ((), (0,), (1,)), "heads": ((), (0,), (1, 2)), "layers": ((0,), (1,), (2,))}
    assert tuple(axes) == LOW
