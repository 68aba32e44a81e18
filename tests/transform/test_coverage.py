"""Every way of using a parameter (tests/transform/uses.py), against the function of the materialised parameters."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.transform.kernels import KERNELS
from tests.transform.uses import CASES

PRODUCTS = [name for name, case in CASES.items() if case.primitive in ("dot_general", "scan", "checkpoint")]
SPLIT = {name: case for name, case in CASES.items() if name != "while"}  # JAX itself cannot reverse a while loop


@cache
def prepare(name, variant="lora"):
    case = CASES[name]
    rank = 1 if "axis of size 1" in name else 2
    spec = lk.Spec(dict.fromkeys(case.params, lk.LoRA(rank=rank, alpha=3, variant=variant, inputs=case.axes)))
    plan = lk.resolve(spec, case.params, case.fn, *case.inputs)
    base, factors = lk.split(case.params, plan, jax.random.key(1))
    leaves, tree = jax.tree.flatten(factors)
    rng = np.random.default_rng(7)
    factors = tree.unflatten([x + 0.3 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])
    return case, plan, base, factors


@cache
def expected(name, variant="lora"):
    """Outputs, and gradients of `loss`, of the function of the merged parameters."""
    case, plan, base, factors = prepare(name, variant)
    fn = jax.jit(lambda f: case.fn(lk.merge(base, f, plan), *case.inputs))
    grads = None if name == "while" else jax.jit(jax.grad(lambda f: loss(fn(f))))(factors)
    return fn(factors), grads


def loss(out):
    return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in jax.tree.leaves(out))


def close(ours, theirs, bits):
    for y, z in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert y.shape == z.shape
        assert y.dtype == z.dtype
        z = np.asarray(z, np.float32)
        np.testing.assert_allclose(np.asarray(y, np.float32), z, atol=4 * 2.0**-bits * max(np.abs(z).max(), 1.0))


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_the_merged(name, variant, record_property):
    case, plan, base, factors = prepare(name, variant)
    theirs, _ = expected(name, variant)
    close(jax.jit(lk.adapt(case.fn, plan))(base, factors, *case.inputs), theirs, case.bits)
    record_property("coverage", (case.primitive, "function", "jit"))
    if variant == "lora":
        close(lk.adapt(case.fn, plan)(base, factors, *case.inputs), theirs, case.bits)
        record_property("coverage", (case.primitive, "function", "merged"))


@pytest.mark.parametrize(("name", "kernel"), [(n, "auto") for n in SPLIT] + [(n, k) for n in PRODUCTS for k in KERNELS])
def test_gradients_equal_autodiff_through_the_merged(name, kernel, record_property):
    case, plan, base, factors = prepare(name)
    adapted = lk.adapt(case.fn, plan, kernel=kernel)
    ours = jax.jit(jax.grad(lambda f: loss(adapted(base, f, *case.inputs))))(factors)
    _, theirs = expected(name)
    close(ours, theirs, case.bits)
    if case.primitive != "cond":  # the branch not taken has none
        assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(ours))
    record_property("coverage", (case.primitive, "function", "grad"))


@pytest.mark.parametrize("name", SPLIT)
def test_stacked_factors_equal_a_loop(name, record_property):
    case, plan, base, factors = prepare(name)
    adapted = lk.adapt(case.fn, plan)
    value_and_grad = jax.value_and_grad(lambda f: loss(adapted(base, f, *case.inputs)))
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), factors)
    alone = jax.jit(value_and_grad)
    if case.primitive == "ragged_dot":
        with pytest.raises(NotImplementedError, match="ragged_dot vmap"):  # of JAX, not ours
            jax.jit(jax.vmap(value_and_grad))(stacked)
        return
    together = jax.jit(jax.vmap(value_and_grad))(stacked)
    for i in (0, 1):
        one, found = (jax.tree.map(lambda x: x[i], tree) for tree in (stacked, together))  # noqa: B023
        close(found, alone(one), case.bits)
    record_property("coverage", (case.primitive, "function", "vmap"))


@pytest.mark.parametrize("name", CASES)
def test_only_what_no_rule_knows_is_materialised(name):
    case, plan, base, factors = prepare(name)
    found = lk.explain(lk.adapt(case.fn, plan), base, factors, *case.inputs)
    assert found.materialised == case.materialised
    assert all(row.reason for row in found.rows if row.how == "materialised")
