"""IA3: one trained gain, over the outputs or over the inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.methods import IA3Leaves
from tests.draws import draw
from tests.methods import promises


def test_the_gain_is_over_outputs_or_inputs():
    def formula(axis):
        return lambda w, leaves, scale: w * np.expand_dims(leaves["gain"].ravel(), axis)

    promises.check_formula(lk.IA3(), formula(0), {"gain": 0})
    promises.check_formula(lk.IA3(feedforward=True), formula(1), {"gain": 0})


@pytest.mark.parametrize("kernel", ["factored", "merged", "plain"])
def test_every_kernel(kernel):
    params, x = {"w": draw(0, 5, 4), "b": draw(1, 4)}, draw(2, 3, 5)

    def fn(p, x):
        return x @ p["w"] + p["b"][None]

    plan = lk.resolve(lk.Spec({"w": lk.IA3()}), params, fn, x)
    gain = {"w": IA3Leaves(draw(3, 4))}
    y, grads = jax.value_and_grad(lambda f: jnp.sum(lk.adapt(fn, plan, kernel=kernel)(params, f, x)))(gain)
    w, b, gains = (np.asarray(v, np.float64) for v in (params["w"], params["b"], gain["w"].gain))
    product = np.asarray(x, np.float64) @ w
    assert float(y) == pytest.approx((product * gains + b).sum(), rel=1e-5)  # the bias has no gain
    np.testing.assert_allclose(grads["w"].gain, product.sum(0), rtol=1e-5)


def test_trials_stack(standard_promotion):
    promises.check_stacking(variant="ia3", alpha=None, rank=1, lr=[1e-2, 3e-2], weight_decay=0.1)


def test_gains_are_at_least_float32():
    promises.check_bfloat16(lk.IA3(), wide=("gain",))
    promises.check_bfloat16(lk.IA3(feedforward=True), wide=("gain",))
    gain = promises.leaves_of(lk.IA3(dtype="bfloat16"), jnp.ones((3, 2), jnp.bfloat16)).gain
    np.testing.assert_array_equal(gain, np.ones(2, np.float32))


def test_bad_settings():
    promises.check_refused(
        lk.IA3,
        [
            ({"feedforward": 1}, "feedforward is 1; it must be true or false."),
            ({"dtype": "int8"}, "dtype is 'int8'; it must name a float dtype such as 'float32' or 'bfloat16'."),
        ],
    )
    with pytest.raises(lk.SpecError, match="has the unknown key 'rank'"):
        lk.Spec.from_dict({"rules": [["w", {"kind": "ia3", "rank": 2}]]})
