"""What JAX attached to an equation holds when it is run again: random numbers, device or host, metadata, names."""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compute_on import compute_on
from jax.experimental.xla_metadata import set_xla_metadata

import lorax_kit as lk

PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)}
X = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)


def adapted(fn, *args, kernel="auto"):
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), PARAMS, fn, *args)
    base, factors = lk.split(PARAMS, plan, jax.random.key(1))
    return lambda f, *args: lk.adapt(fn, plan, kernel=kernel)(base, f, *args), factors


def masked(x, key):
    with jax.threefry_partitionable(False):
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0)


WHERE = {
    "flat": lambda p, x, key: masked(x, key) @ p["w"],
    "jit": lambda p, x, key: jax.jit(masked)(x, key) @ p["w"],
    "remat": lambda p, x, key: jax.checkpoint(lambda x, w: jnp.tanh(masked(x, key) @ w))(x, p["w"]),
    "scan": lambda p, x, key: jax.lax.scan(lambda c, _: (masked(c, key), None), x, None, length=2)[0] @ p["w"],
    "cond": lambda p, x, key: jax.lax.cond(x[0, 0] < 9, lambda w: masked(x, key) @ w, lambda w: x @ w, p["w"]),
    "recomputed": lambda p, x, key: jnp.tanh(masked(jnp.tanh(x @ p["w"]), key)) @ p["w"].T,
}


@pytest.mark.parametrize("where", WHERE)
def test_random_numbers_are_those_of_the_function(where):
    fn, key = WHERE[where], jax.random.key(0)
    run, factors = adapted(fn, X, key)
    np.testing.assert_allclose(jax.jit(run)(factors, X, key), fn(PARAMS, X, key), atol=1e-5)
    grad = jax.jit(jax.grad(lambda f: jnp.sum(jnp.sin(run(f, X, key)))))(factors)["w"].b
    dw = jax.grad(lambda p: jnp.sum(jnp.sin(fn(p, X, key))))(PARAMS)["w"]
    np.testing.assert_allclose(grad, np.asarray(factors["w"].a) @ np.asarray(dw), atol=1e-4)


def contexts(jaxpr, read):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, read(eqn)
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from contexts(getattr(inner, "jaxpr", inner), read)


def test_low_rank_products_run_where_their_base_does():
    def fn(p, x):
        with compute_on("device_host"), set_xla_metadata(group="1"):
            y = x @ p["w"]
        return y * 2

    run, factors = adapted(fn, X, kernel="plain")
    jaxpr = jax.make_jaxpr(run)(factors, X).jaxpr
    places = list(contexts(jaxpr, lambda eqn: (eqn.ctx.compute_type, eqn.ctx.xla_metadata)))
    products = [place for name, place in places if name == "dot_general"]
    assert products == [("device_host", {"group": "1"})] * 3
    assert ("mul", (None, None)) in places


def test_names_of_the_function_reach_the_program():
    def fn(p, x):
        with jax.named_scope("attention"):
            return x @ p["w"]

    run, factors = adapted(fn, X, kernel="plain")
    jaxpr = jax.make_jaxpr(run)(factors, X).jaxpr
    names = [name for kind, name in contexts(jaxpr, lambda eqn: str(eqn.source_info.name_stack)) if "dot" in kind]
    assert names == ["attention"] * 3
