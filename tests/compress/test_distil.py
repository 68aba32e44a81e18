"""Distillation: what is trained, that no step is lost, and that nothing that is not finite passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.compress import CompressError, CompressPlan, compress, distil, distillation, heal, with_residuals
from tests.draws import draw

pytestmark = pytest.mark.usefixtures("standard_promotion")


def fn(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


def loss(y, x):
    return jnp.mean(y**2)


@pytest.fixture(scope="module")
def model():
    params, x = {"up": draw(0, 8, 10), "down": draw(1, 10, 6)}, draw(2, 16, 8)
    sites = lk.resolve(lk.Spec({"*": lk.LoRA(rank=1)}), params, fn, x)
    return params, x, compress(params, CompressPlan(method="svd", sites=sites, ranks={"up": 3, "down": 2}))


def test_a_single_step_trains(model):
    params, x, small = model
    after = distil(fn, params, loss, [x], steps=1, lr=1e-2, progress=False)
    assert float(jnp.max(jnp.abs(after["up"] - params["up"]))) == pytest.approx(1e-2, rel=0.1)
    healed = heal(fn, small, loss, [x] * 2, jax.random.key(0), steps=2, rank=1, progress=False)
    assert (healed["up"].b != small["up"].b).any()
    assert (healed["up"].a != small["up"].a).any()


def test_what_is_not_used_or_no_float_stays(model):
    params, x, _ = model
    more = {**params, "pooler": jnp.ones(3), "count": jnp.arange(4), "p.(x)": jnp.ones(6)}
    after = distil(lambda p, x: fn(p, x) + p["p.(x)"][None], more, loss, [x] * 3, steps=3, lr=1e-2, progress=False)
    for name in ("pooler", "count"):
        np.testing.assert_array_equal(after[name], more[name])
    assert (after["p.(x)"] != 1).all()


def test_what_is_not_finite_is_an_error_whenever_it_comes(model):
    params, x, small = model
    batches = [x, *[x * jnp.nan] * 8, x]
    with pytest.raises(CompressError, match="not finite by step 10"):
        distil(fn, params, loss, batches, steps=10, progress=False)
    with pytest.raises(CompressError, match="not finite"):
        heal(fn, small, loss, batches, jax.random.key(0), steps=10, rank=None, progress=False)
    mixed = distillation(lambda x: fn(params, x) * jnp.nan, loss)
    assert jnp.isnan(mixed(fn(params, x), x))
    with pytest.raises(CompressError, match="ended after 2 of 5 steps"):
        distil(fn, params, loss, [x] * 2, steps=5, progress=False)


def test_a_residual_is_what_the_product_leaves(model):
    params, _, small = model
    kept = with_residuals(params, small)
    for name in params:
        np.testing.assert_allclose(kept[name].restore(), params[name], atol=1e-6)
    for one, two, message in (
        (params, kept, "'down' has a residual already"),
        (small, params, "no parameter of the second argument is low-rank"),
        (small, small, "give the dense params"),
        ({"up": params["up"]}, small, "give the dense params"),
        ({**params, "down": params["down"][:, :3]}, small, "low-rank of shape"),
        ({**params, "down": params["down"] * jnp.nan}, small, "not finite"),
    ):
        with pytest.raises(CompressError, match=message):
            with_residuals(one, two)
