"""Gains act in at least fp32 and are rounded once: adapted and merged agree to one rounding of a bf16 output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax_kit as lk
from tests.draws import draw, moved

CONV = {"window_strides": (1,), "padding": "SAME", "dimension_numbers": ("NWC", "WIO", "NWC")}
USES = {
    "product": ((6, 5), (4, 6), lambda p, x: x @ p["w"]),
    "transposed": ((6, 5), (4, 5), lambda p, x: x @ p["w"].T),
    "convolution": ((3, 2, 5), (2, 6, 2), lambda p, x: lax.conv_general_dilated(x, p["w"], **CONV)),
    "lookup": ((6, 5), None, lambda p, i: p["w"][i]),
}


@pytest.mark.parametrize("use", USES)
def test_a_gain_is_not_rounded_before_it_multiplies(use):
    shape, inputs, fn = USES[use]
    params = {"w": draw(0, *shape).astype(jnp.bfloat16)}
    x = jnp.arange(5) if inputs is None else draw(1, *inputs).astype(jnp.bfloat16)
    plan = lk.resolve(lk.Spec({"w": lk.IA3()}), params, fn, x)
    base, factors = lk.split(params, plan, jax.random.key(0))
    gain = 1 + 0.003 * draw(2, *factors["w"].gain.shape)  # below the resolution of bf16, which is 0.0078 at 1
    got = lk.adapt(fn, plan)(base, {"w": factors["w"]._replace(gain=gain)}, x)
    assert got.dtype == jnp.bfloat16
    plain = np.asarray(fn(params, x), np.float64)
    exact = plain * np.asarray(gain, np.float64)
    assert np.abs(np.asarray(got, np.float64) - exact).max() <= 2**-8 * np.abs(exact).max()
    assert factors["w"].gain.dtype == jnp.float32
    rounded = np.asarray(gain.astype(jnp.bfloat16), np.float64)
    assert np.abs(rounded - np.asarray(gain, np.float64)).max() > 1e-3  # what rounding the gain first would lose


@pytest.mark.parametrize("kernel", ["factored", "merged", "plain"])
@pytest.mark.parametrize("setting", [lk.LoRA, lk.DoRA, lk.LoHa, lk.AdaLoRA])
def test_a_scale_keeps_the_digits_of_float64(setting, kernel):
    """alpha / rank = 7 / 9 has no float32."""
    with jax.enable_x64(True):
        params, x = {"w": np.asarray(draw(0, 6, 5), np.float64)}, np.asarray(draw(1, 4, 6), np.float64)

        def fn(p, x):
            return x @ p["w"]

        plan = lk.resolve(lk.Spec({"w": setting(rank=3, alpha=7 / 3, dtype="float64")}), params, fn, x)
        base, factors = lk.split(params, plan, jax.random.key(0))
        factors = moved(factors)
        got = lk.adapt(fn, plan, kernel=kernel)(base, factors, x)
        np.testing.assert_allclose(got, fn(lk.merge(base, factors, plan), x), rtol=1e-13, atol=1e-13)
