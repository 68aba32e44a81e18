"""Whole numbers that activations decide, inside what the backward pass computes again: constants to the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax_kit as lk

rng = np.random.default_rng(0)
P = {"a": jnp.asarray(rng.normal(size=(6, 6)) / 3, jnp.float32), "b": jnp.asarray(rng.normal(size=(6, 6)) / 3, "f4")}
X = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)


@jax.custom_jvp
def times(h, n):
    return h * n.astype(h.dtype)


@times.defjvp
def _times_jvp(primals, tangents):
    return times(*primals), tangents[0] * primals[1].astype(jnp.float32)


@jax.custom_vjp
def shifted(h, n):
    return jnp.roll(h, n, axis=0), n + 1


shifted.defvjp(lambda h, n: (shifted(h, n), n), lambda n, g: (jnp.roll(g[0], -n, axis=0), None))


def hidden(p, x):
    return jax.nn.gelu(x @ p["a"])


def positive(h):
    return jnp.sum((h > 0).astype(jnp.int32))


def routed(p, x):
    h = hidden(p, x)
    gate, choice = lax.top_k(jax.nn.softmax(h), 2)
    return jnp.sum(gate[..., None] * p["b"][choice], 1)


FNS = {
    "cond": lambda p, x: (lambda h: lax.cond(positive(h) > 9, jnp.sin, jnp.cos, h) @ p["b"])(hidden(p, x)),
    "cond over products": lambda p, x: (
        lambda h: lax.cond(positive(h) > 9, lambda h: jnp.sin(h) @ p["b"], lambda h: jnp.cos(h) @ p["b"], h)
    )(hidden(p, x)),
    "switch by argmax": lambda p, x: (
        lambda h: lax.switch(jnp.argmax(jnp.mean(h, 0)) % 3, [jnp.sin, jnp.cos, jnp.tanh], h) @ p["b"]
    )(hidden(p, x)),
    "cond with an integer operand": lambda p, x: (
        lambda h: (
            lax.cond(
                x[0, 0] > 0,
                lambda h, n: h * n.astype(jnp.float32) / 9,
                lambda h, n: h - n.astype(jnp.float32),
                h,
                positive(h),
            )
            @ p["b"]
        )
    )(hidden(p, x)),
    "scan over a cond": lambda p, x: (
        lax.scan(lambda h, _: (lax.cond(positive(h) > 9, jnp.sin, jnp.cos, hidden(p, h)), None), x, None, length=3)[0]
        @ p["b"]
    ),
    "scan with a count": lambda p, x: (
        lambda h: (
            lax.scan(lambda c, _: ((jnp.sin(c[0]), c[1] + 1), c[1]), (h, positive(h)), None, length=3)[0][0] @ p["b"]
        )
    )(hidden(p, x)),
    "scan that masks by a count": lambda p, x: (
        lambda h: (
            lax.scan(lambda c, i: (jnp.where(i < positive(h) % 3, jnp.sin(c), c), None), h, jnp.arange(3))[0] @ p["b"]
        )
    )(hidden(p, x)),
    "while": lambda p, x: (
        lambda h: (
            (jnp.sin(h) + lax.while_loop(lambda n: n > 2, lambda n: n // 2, positive(h)).astype(jnp.float32)) @ p["b"]
        )
    )(hidden(p, x)),
    "rows by argmax": lambda p, x: (lambda h: jnp.tanh(h[jnp.argmax(h, 0)]) @ p["b"])(hidden(p, x)),
    "slice by a count": lambda p, x: (lambda h: lax.dynamic_slice(jnp.tanh(h), (positive(h) % 3, 0), (2, 6)) @ p["b"])(
        hidden(p, x)
    ),
    "sort": lambda p, x: (lambda h: jnp.take_along_axis(jnp.sin(h), jnp.argsort(h, 0), 0) @ p["b"])(hidden(p, x)),
    "experts by top_k": routed,
    "custom_jvp": lambda p, x: (lambda h: times(jnp.sin(h), positive(h) % 5) @ p["b"])(hidden(p, x)),
    "custom_vjp": lambda p, x: (lambda h, n: lax.cond(n > 3, jnp.sin, jnp.cos, h) @ p["b"])(
        *shifted(jnp.sin(hidden(p, x)), positive(hidden(p, x)) % 5)
    ),
    "random key": lambda p, x: (
        lambda h: (jnp.sin(h) * jax.random.normal(jax.random.fold_in(jax.random.key(0), positive(h)), h.shape)) @ p["b"]
    )(hidden(p, x)),
}


@pytest.mark.parametrize("name", FNS)
def test_gradients_equal_autodiff_through_the_merged_parameters(name):
    fn = FNS[name]
    plan = lk.resolve(lk.Spec({"{a,b}": lk.LoRA(rank=2)}), P, fn, X)
    base, factors = lk.split(P, plan, jax.random.key(0))
    factors = jax.tree.map(lambda v: v + 0.1, factors)
    adapted = lk.adapt(fn, plan)
    got = jax.jit(jax.grad(lambda f: jnp.sum(jnp.sin(adapted(base, f, X)))))(factors)
    expected = jax.grad(lambda f: jnp.sum(jnp.sin(fn(lk.merge(base, f, plan), X))))(factors)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, atol=2e-5 * max(1, float(jnp.abs(e).max())))


def amplified(p, x):
    """Sums times the number of positive ones, in a sine: an error of their last bit is a hundred of the gradient's."""
    h = hidden(p, 3 * x)
    return jnp.sum(jnp.sin((h * positive(h).astype(h.dtype)) @ p["b"]))


def test_amplified_rounding_is_no_larger_than_that_of_the_merged_parameters():
    """Against float64, over 32 draws of the factors: the gradients of both are off by some 1e-6 of their size."""

    def gradients(dtype, *forms):
        params, x = jax.tree.map(lambda v: np.asarray(v, dtype), (P, X))
        plan = lk.resolve(lk.Spec({"{a,b}": lk.LoRA(rank=2, dtype=dtype)}), params, amplified, x)
        draws = np.random.default_rng(1)
        factors = jax.tree.map(
            lambda v: (draws.normal(size=(32, *v.shape)) / 3).astype(np.float32).astype(dtype),
            lk.split(params, plan, jax.random.key(0))[1],
        )
        run = {
            "factored": lk.adapt(amplified, plan),
            "merged": lambda base, f, x: amplified(lk.merge(base, f, plan), x),
        }
        many = (jax.vmap(jax.grad(run[form], argnums=1), (None, 0, None)) for form in forms)
        return [[np.asarray(g) for g in jax.tree.leaves(jax.jit(each)(params, factors, x))] for each in many]

    found = gradients("float32", "factored", "merged")
    with jax.enable_x64(True):
        (exact,) = gradients("float64", "merged")
    ours, theirs = (
        max(np.linalg.norm(g - e) / np.linalg.norm(e) for g, e in zip(some, exact, strict=True)) for some in found
    )
    assert 1e-7 < theirs < 1e-4
    assert ours < 2 * theirs, (ours, theirs)
