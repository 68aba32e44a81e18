"""IA3: one trained gain, over the outputs or over the inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.methods import IA3Leaves
from tests import tiny
from tests.draws import draw
from tests.methods import promises


def test_the_gain_is_over_outputs_or_inputs():
    promises.equals_the_formula(lk.IA3(), lambda w, leaves, scale: w * leaves["gain"].ravel())
    promises.equals_the_formula(lk.IA3(feedforward=True), lambda w, leaves, scale: w * leaves["gain"].reshape(-1, 1))


@pytest.mark.parametrize("feedforward", [False, True])
def test_every_kind_of_site(feedforward):
    promises.on_every_kind_of_site(lk.IA3(feedforward=feedforward))


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
    promises.stacked_equals_solo(
        tiny.study(variant="ia3", alpha=None, rank=1, lr=[1e-2, 3e-2], seed=[0], probe_lr=(), weight_decay=0.1)
    )


def test_gains_are_at_least_float32():
    promises.bfloat16(lk.IA3())
    promises.bfloat16(lk.IA3(feedforward=True))
    plan = lk.resolve(lk.Spec({"w": lk.IA3(dtype="bfloat16")}), {"w": jnp.ones((3, 2), jnp.bfloat16)})
    gain = lk.split({"w": jnp.ones((3, 2), jnp.bfloat16)}, plan, jax.random.key(0))[1]["w"].gain
    assert gain.dtype == jnp.float32
    np.testing.assert_array_equal(gain, np.ones(2))


def test_saved_and_loaded(tmp_path):
    promises.saved_and_loaded(lk.IA3(feedforward=True), tmp_path / "adapter")


def test_bad_settings():
    promises.refused(
        lk.IA3,
        [
            ({"feedforward": 1}, "feedforward is 1; it must be true or false."),
            ({"dtype": "int8"}, "dtype is 'int8'; it must name a float dtype such as 'float32' or 'bfloat16'."),
        ],
    )
    with pytest.raises(lk.SpecError, match="has the unknown key 'rank'"):
        lk.Spec.from_dict({"rules": [["w", {"kind": "ia3", "rank": 2}]]})
