"""Adapted functions under JAX's own transformations; what tracing costs, and what it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from tests.draws import draw, moved

KEY = jax.random.key(0)


PARAMS = {"q": draw(0, 6, 4), "k": draw(1, 6, 4), "v": draw(2, 6, 3), "out": draw(3, 3, 6), "bias": draw(4, 6)}
X = draw(5, 70, 6)


def attend(p, x):
    weights = jax.nn.softmax((x @ p["q"]) @ (x @ p["k"]).T)
    return jnp.tanh(weights @ (x @ p["v"])) @ p["out"] + p["bias"][None]


def prepare(fn=attend, params=PARAMS, x=X, kernel="auto", rules=None, **settings):
    rules = rules or {"{q,k,v,out}": lk.LoRA(rank=2, **settings)}
    plan = lk.resolve(lk.Spec(rules), params, fn, x)
    base, factors = lk.split(params, plan, KEY)
    return plan, base, moved(factors), lk.adapt(fn, plan, kernel=kernel)


def merged_loss(plan, base):
    return lambda f: jnp.sum(jnp.sin(attend(lk.merge(base, f, plan), X)))


@pytest.mark.parametrize("kernel", ["factored", "merged", "plain"])
def test_reverse_over_reverse(kernel):
    plan, base, factors, adapted = prepare(kernel=kernel)

    def curvature(loss):
        """The gradient of the squared gradient: as meta-learning needs it."""
        squares = lambda f: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(f)))  # noqa: E731
        return jax.jit(jax.grad(squares))(factors)

    ours = curvature(lambda f: jnp.sum(jnp.sin(adapted(base, f, X))))
    theirs = curvature(merged_loss(plan, base))
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(theirs))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * largest)


def test_forward_mode_through_the_plain_kernel():
    plan, base, factors, adapted = prepare(kernel="plain")
    loss = lambda f: jnp.sum(jnp.sin(adapted(base, f, X)))  # noqa: E731
    _, ours = jax.jvp(loss, (factors,), (factors,))
    _, theirs = jax.jvp(merged_loss(plan, base), (factors,), (factors,))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_checkpoint_and_jit_around_change_no_gradient():
    _, base, factors, adapted = prepare()
    loss = lambda fn: jax.grad(lambda f: jnp.sum(jnp.sin(fn(base, f, X))))(factors)  # noqa: E731
    plain = loss(adapted)
    for around in (jax.checkpoint(adapted), jax.jit(adapted), jax.jit(jax.checkpoint(adapted))):
        for x, y in zip(jax.tree.leaves(loss(around)), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5 * float(jnp.abs(y).max()))


def test_export():
    _, base, factors, adapted = prepare()
    flat = jax.tree.map(jnp.asarray, {k: (f.a, f.b) for k, f in factors.items()})

    def serve(base, flat, x):
        return adapted(base, {k: lk.Factors(a, b) for k, (a, b) in flat.items()}, x)

    exported = jax.export.export(jax.jit(serve))(base, flat, X)
    np.testing.assert_allclose(exported.call(base, flat, X), adapted(base, factors, X), atol=1e-5)


def test_a_plan_without_sites_leaves_the_program_as_it_is():
    _, base, factors, adapted = prepare(rules={"bias": lk.Full()})
    with_bias = lambda base, f, x: attend({**base, "bias": f["bias"].value}, x)  # noqa: E731
    assert str(jax.make_jaxpr(adapted)(base, factors, X)) == str(jax.make_jaxpr(with_bias)(base, factors, X))


def products(fn, *args):
    return str(jax.make_jaxpr(fn)(*args)).count("dot_general")


@pytest.mark.parametrize("kernel", ["factored", "merged"])
def test_sites_that_read_the_same_input_share_their_products(kernel):
    """Five products of the model. Merged: q, k and v in one instead of three, and each site's sum. Factored: one
    product down for the three, one up each."""
    plan, base, factors, adapted = prepare(kernel=kernel)
    count = products(adapted, base, factors, X)
    assert count == {"merged": 3 + 1 + 4, "factored": 3 + 1 + (1 + 3) + 2}[kernel]
    rows = {r.path: r for r in lk.explain(adapted, base, factors, X).rows}
    assert "in one product with 2 more" in rows["k"].reason
    assert "in one product" not in rows["out"].reason
    np.testing.assert_allclose(adapted(base, factors, X), attend(lk.merge(base, factors, plan), X), atol=2e-5)


def test_sites_with_dropout_of_their_own_run_alone():
    _, base, factors, adapted = prepare(dropout=0.5)
    wet = lk.explain(adapted, base, factors, X, dropout_key=KEY)
    assert not any("in one product" in r.reason for r in wet.rows)


def test_keywords_and_pytrees_pass_through():
    def fn(p, batch, *, scale=1.0, flag="relu"):
        return {"out": getattr(jax.nn, flag)(batch["x"] @ p["w"]) * scale, "name": batch["n"]}

    params = {"w": draw(0, 6, 4)}
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), params, fn, {"x": X, "n": 3}, flag="tanh")
    base, factors = lk.split(params, plan, KEY)
    got = lk.adapt(fn, plan)(base, factors, {"x": X, "n": 3}, scale=2.0, flag="tanh")
    np.testing.assert_allclose(got["out"], 2 * jnp.tanh(X @ params["w"]), atol=1e-6)
    assert int(got["name"]) == 3
