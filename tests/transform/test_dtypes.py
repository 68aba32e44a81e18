"""Every use in every mix of dtypes under strict promotion: what the library widens, it casts by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.arrays.dtypes import wide, widest
from tests.transform.uses import CASES


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def there_and_back(fn, x):
    out, back = jax.vjp(fn, x)
    return out, back(out)[0]


MIXES = [
    ("bfloat16", "float32", lk.DoRA),
    ("float32", "bfloat16", lk.DoRA),
    ("bfloat16", "bfloat16", lk.LoRA),
]


@pytest.mark.parametrize(("model", "factors", "method"), MIXES)
def test_every_use_traces_forward_and_backward(model, factors, method):
    """Traced only: promotion is a matter of types."""
    traced = 0
    for name, case in CASES.items():
        params, inputs = cast(case.params, model), cast(case.inputs, model)
        try:
            expected, _ = jax.eval_shape(lambda p, c=case, x=inputs: there_and_back(lambda p: c.fn(p, *x), p), params)
        except Exception:  # the function itself mixes dtypes, or is a while loop
            continue
        setting = method(rank=1, dtype=factors, inputs=case.axes)
        plan = lk.resolve(lk.Spec(dict.fromkeys(params, setting)), params, case.fn, *inputs)

        def all_of_it(key, params=params, inputs=inputs, plan=plan, case=case):
            base, f = lk.split(params, plan, key)
            adapted = lk.adapt(case.fn, plan)
            return *there_and_back(lambda f: adapted(base, f, *inputs), f), lk.merge(base, f, plan), f

        out, grads, merged, f = jax.eval_shape(all_of_it, jax.random.key(0))
        assert out == expected, name
        assert merged == jax.eval_shape(lambda p=params: p), name
        assert grads == f, name
        traced += 1
    assert traced > 0.8 * len(CASES)


def test_a_materialised_site_is_rounded_once():
    """Base and update in bf16, their sum in fp32: as merge has it."""
    params = {"w": jnp.full((3, 4), 1.0, jnp.bfloat16)}
    fn = lambda p, x: x @ jnp.abs(p["w"])  # noqa: E731
    x = jnp.eye(3, dtype=jnp.bfloat16)
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2, alpha=2, dtype="bfloat16")}), params, fn, x)
    a = jnp.full((2, 3), 1 / 16, jnp.bfloat16)
    base, _ = lk.split(params, plan, jax.random.key(0))
    factors = {"w": lk.Factors(a, jnp.full((2, 4), 3 / 64, jnp.bfloat16))}
    merged = lk.merge(base, factors, plan)["w"]
    np.testing.assert_array_equal(lk.adapt(fn, plan)(base, factors, x), merged)
    np.testing.assert_array_equal(
        np.asarray(merged, np.float64), 1 + 2 / 256
    )  # 1 + 2 * 3 / 1024, to the nearest of 1/128


def test_dtypes_are_widened_as_jax_does_without_strictness():
    assert widest("bfloat16", "float16") == widest("float16", "bfloat16") == np.dtype("float32")
    assert widest("bfloat16", "bfloat16") == jnp.bfloat16
    assert wide("bfloat16") == wide("float16", "float32") == np.dtype("float32")
    assert wide("float64", "bfloat16") == np.dtype("float64")


@pytest.mark.parametrize("setting", [lk.LoRA(rank=2), lk.DoRA(rank=2), lk.LoHa(rank=2)], ids=lambda s: s.kind)
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float4_e2m1fn])
def test_parameters_of_eight_bits_and_less_merge(setting, dtype):
    params, fn = {"w": jnp.ones((6, 4), dtype)}, lambda p, x: x @ p["w"].astype(x.dtype)
    plan = lk.resolve(lk.Spec({"w": setting}), params, fn, jnp.ones((5, 6)))
    base, factors = lk.split(params, plan, jax.random.key(0))
    merged = lk.merge(base, factors, plan)["w"]
    assert merged.dtype == dtype
    assert bool((merged == params["w"]).all())
