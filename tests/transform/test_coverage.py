"""Every way of using a parameter (tests/transform/uses.py), against the function of the materialised parameters."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.transform.kernels import KERNELS
from tests.draws import moved
from tests.transform.uses import CASES

PRODUCTS = [name for name, case in CASES.items() if case.primitive in ("dot_general", "scan", "checkpoint")]


def prepare(name, variant="lora"):
    case = CASES[name]
    rank = 1 if "axis of size 1" in name else 2
    spec = lk.Spec(dict.fromkeys(case.params, lk.LoRA(rank=rank, alpha=3, variant=variant, inputs=case.axes)))
    plan = lk.resolve(spec, case.params, case.fn, *case.inputs)
    base, factors = lk.split(case.params, plan, jax.random.key(1))
    return case, plan, base, moved(factors)


def loss_and_outputs(fn, reverse=True):
    """factors -> ((loss, outputs), gradients); without gradients where JAX has none."""

    def loss(factors):
        out = fn(factors)
        return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in jax.tree.leaves(out)), out

    return jax.value_and_grad(loss, has_aux=True) if reverse else lambda f: (loss(f), ())


@cache
def expected(name):
    """What the function of the merged parameters gives."""
    case, plan, base, factors = prepare(name)
    fn = loss_and_outputs(lambda f: case.fn(lk.merge(base, f, plan), *case.inputs), name != "while")
    return jax.jit(fn)(factors)


def close(ours, theirs, bits):
    for y, z in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert y.shape == z.shape
        assert y.dtype == z.dtype
        z = np.asarray(z, np.float32)
        np.testing.assert_allclose(np.asarray(y, np.float32), z, atol=4 * 2.0**-bits * max(np.abs(z).max(), 1.0))


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_the_merged_alone_and_stacked(name, record_property):
    case, plan, base, factors = prepare(name)
    adapted, reverse = lk.adapt(case.fn, plan), name != "while"  # JAX itself cannot reverse a while loop
    fn = loss_and_outputs(lambda f: adapted(base, f, *case.inputs), reverse)
    alone = jax.jit(fn)
    close(alone(factors), expected(name), case.bits)
    proved = ["merged", "jit", *(["grad"] if reverse else [])]
    if reverse and case.primitive != "cond":  # the branch not taken has no gradient
        assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(alone(factors)[1]))
    stacked = jax.tree.map(lambda x: jnp.stack([0.5 * x, x]), factors)
    if case.primitive == "ragged_dot":
        with pytest.raises(NotImplementedError, match="ragged_dot vmap"):  # of JAX, not ours
            jax.vmap(fn)(stacked)
    else:
        together = jax.jit(jax.vmap(fn))(stacked)
        for i in (0, 1):
            one, found = (jax.tree.map(lambda x: x[i], tree) for tree in (stacked, together))  # noqa: B023
            close(found, alone(one), case.bits)
        proved.append("vmap")
    for contract in proved:
        record_property("coverage", (case.primitive, "function", contract))


@pytest.mark.parametrize("name", CASES)
def test_only_what_no_rule_knows_is_materialised(name):
    case, plan, base, factors = prepare(name)
    found = lk.explain(lk.adapt(case.fn, plan), base, factors, *case.inputs)
    assert found.materialised == case.materialised + case.own_rule
    assert all(row.reason for row in found.rows if row.how == "materialised")


@pytest.mark.parametrize("name", CASES)
def test_magnitudes_go_wherever_factors_go(name):
    case, plan, base, factors = prepare(name, "dora")
    ours = jax.jit(lk.adapt(case.fn, plan))(base, factors, *case.inputs)
    close(ours, jax.jit(lambda f: case.fn(lk.merge(base, f, plan), *case.inputs))(factors), case.bits)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_every_kernel_equals_the_merged(name, kernel):
    case, plan, base, factors = prepare(name)
    adapted = lk.adapt(case.fn, plan, kernel=kernel)
    close(jax.jit(loss_and_outputs(lambda f: adapted(base, f, *case.inputs)))(factors), expected(name), case.bits)


@pytest.mark.parametrize("name", ["heads in and out", "fused qkv, joined", "scanned layers", "conv 1d, groups", "cond"])
def test_outside_jit_too(name):
    case, plan, base, factors = prepare(name)
    close(lk.adapt(case.fn, plan)(base, factors, *case.inputs), expected(name)[0][1], case.bits)
