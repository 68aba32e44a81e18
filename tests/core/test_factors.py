"""Where factors start: keyed per site and row, zero update, PEFT's distribution; and the split that makes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk

PARAMS = {"q": {"kernel": jnp.ones((64, 48))}, "k": {"kernel": jnp.ones((64, 48))}, "table": jnp.ones((50, 16))}


def factors(rules, seed=0, fn=None, inputs=()):
    plan = lk.resolve(lk.Spec(rules), PARAMS, fn, *inputs)
    return lk.split(PARAMS, plan, jax.random.key(seed))[1]


def test_the_first_rows_of_a_larger_rank_are_the_smaller_ranks_draw():
    small, large = (factors({"q/kernel": lk.LoRA(rank=r)})["q/kernel"].a for r in (3, 16))
    assert np.asarray(large[:3]).tobytes() == np.asarray(small).tobytes()


@pytest.mark.parametrize("init", ["kaiming_uniform", "normal"])
def test_adding_a_site_changes_no_other(init):
    one = factors({"q/kernel": lk.LoRA(rank=4, init=init)})
    two = factors({"{q,k}/kernel": lk.LoRA(rank=4, init=init)})
    assert np.asarray(one["q/kernel"].a).tobytes() == np.asarray(two["q/kernel"].a).tobytes()
    assert float(jnp.abs(two["q/kernel"].a - two["k/kernel"].a).max()) > 0.01
    assert (
        float(jnp.abs(one["q/kernel"].a - factors({"q/kernel": lk.LoRA(rank=4, init=init)}, 1)["q/kernel"].a).max()) > 0
    )


def test_draws_have_the_stated_distribution():
    a = np.asarray(factors({"q/kernel": lk.LoRA(rank=48)})["q/kernel"].a, np.float64)
    bound = 1 / 8  # sqrt(1 / 64)
    assert np.abs(a).max() <= bound
    # Mean and standard deviation of U(-1/8, 1/8) over 3072 draws, at 5 standard errors.
    assert abs(a.mean()) < 5 * bound / 3**0.5 / a.size**0.5
    assert a.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    b = np.asarray(factors({"q/kernel": lk.LoRA(rank=48, init="normal")})["q/kernel"].a, np.float64)
    assert b.std() == pytest.approx(bound, rel=0.07)
    assert np.abs(b).max() > 2 * bound


def test_the_other_factor_is_zero():
    found = factors({"q/kernel": lk.LoRA(rank=4)})["q/kernel"]
    assert not np.any(found.b)
    looked = factors({"table": lk.LoRA(rank=4)}, fn=lambda p, i: p["table"][i], inputs=(jnp.arange(3),))["table"]
    assert not np.any(looked.a)
    assert looked.a.shape == (4, 50)
    assert np.asarray(looked.b).std() == pytest.approx(1, rel=0.4)


def test_split_copies_nothing_of_the_base_and_everything_of_full_leaves():
    plan = lk.resolve(lk.Spec({"q/kernel": lk.LoRA(rank=2), "table": lk.Full()}), PARAMS)
    base, trained = lk.split(PARAMS, plan, jax.random.key(0))
    for x, y in zip(jax.tree.leaves(base), jax.tree.leaves(PARAMS), strict=True):
        assert x is y
    assert trained["table"].value.dtype == jnp.float32
    assert trained["table"].value.unsafe_buffer_pointer() != PARAMS["table"].unsafe_buffer_pointer()


def test_merge_rounds_once_into_a_bf16_base():
    params = {"w": jax.random.normal(jax.random.key(3), (16, 12)).astype(jnp.bfloat16)}
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=3, alpha=6)}), params)
    base, start = lk.split(params, plan, jax.random.key(0))
    f = start["w"]._replace(b=jax.random.normal(jax.random.key(1), (3, 12)))
    exact = np.asarray(params["w"], np.float64) + 2 * np.asarray(f.a, np.float64).T @ np.asarray(f.b, np.float64)
    got = lk.merge(base, {"w": f}, plan)["w"]
    assert got.dtype == jnp.bfloat16
    # Half a unit in the last place of bf16 (8 significant bits), and the fp32 product's own error.
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2**-7.99)


def test_leaves_that_are_not_arrays_pass_through():
    params = {"w": jnp.ones((4, 3)), "name": "layer", "activation": jnp.tanh, "none": None}
    plan = lk.resolve(
        lk.Spec({"w": lk.LoRA(rank=1)}), params, lambda p, x: p["activation"](x @ p["w"]), jnp.ones((2, 4))
    )
    merged = lk.merge(*lk.split(params, plan, jax.random.key(0)), plan)
    assert merged["name"] == "layer"
    assert merged["activation"] is jnp.tanh
    assert merged["none"] is None


def test_params_that_the_plan_does_not_fit_say_so():
    plan = lk.resolve(lk.Spec({"q/kernel": lk.LoRA(rank=2)}), PARAMS)
    with pytest.raises(lk.PlanError, match="which these params do not have"):
        lk.split({"k": PARAMS["k"]}, plan, jax.random.key(0))
    with pytest.raises(lk.PlanError, match="the plan expects"):
        lk.split({"q": {"kernel": jnp.ones((3, 48))}}, plan, jax.random.key(0))
