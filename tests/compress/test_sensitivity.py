"""Ranks by predicted loss: an error counts as much as the loss minds it."""

import jax
import jax.numpy as jnp
import pytest

import lorax_kit as lk
from lorax_kit.compress import calibrate, compress, compressed, plan_ranks
from lorax_kit.compress.replace import _sensitivity
from tests.draws import draw


def fn(p, x):
    """Large outputs that hardly count beside small ones that do."""
    return 1e-3 * ((100 * x) @ p["loud"]) + x @ p["quiet"]


def loss(y, x):
    return jnp.mean((y - x[:, :16]) ** 2)


@pytest.fixture(scope="module")
def model():
    params, x = {"loud": draw(0, 24, 16), "quiet": draw(1, 24, 16)}, draw(2, 64, 24)
    return params, x, lk.resolve(lk.Spec({"*": lk.LoRA(rank=1)}), params, fn, x)


def test_rank_goes_where_the_loss_minds(model):
    params, x, sites = model
    blind, seeing = (calibrate(fn, params, sites, [x], loss=own, progress=False) for own in (None, loss))
    with pytest.warns(UserWarning, match="without gradients"):
        plans = [plan_ranks(params, sites, keep=0.5, method="whitened", stats=stats) for stats in (blind, seeing)]
    ranks = [dict(plan.ranks) for plan in plans]
    assert ranks[0].get("loud", 16) > ranks[0].get("quiet", 16)
    assert ranks[1].get("loud", 16) < ranks[1].get("quiet", 16)
    errors = [float(jnp.sum((compressed(fn)(compress(params, plan, blind), x) - fn(params, x)) ** 2)) for plan in plans]
    assert errors[1] < 0.6 * errors[0]


def test_sensitivity_is_the_mean_squared_gradient_of_the_outputs(model):
    params, x, sites = model
    stats = calibrate(fn, params, sites, [x], loss=loss, progress=False)
    found = {path: float(_sensitivity(stats[path], path)[0]) for path in params}
    assert found["loud"] / found["quiet"] == pytest.approx(1e-6, rel=1e-3)
    # Exactly, for one input: (x g^T)^2 summed over x^2 is g^2.
    one = calibrate(fn, params, sites, [x[:1]], loss=loss, progress=False)
    gradient = jax.grad(loss)(fn(params, x[:1]), x[:1])
    assert float(_sensitivity(one["quiet"], "quiet")[0]) == pytest.approx(float(jnp.mean(gradient**2)), rel=1e-5)
