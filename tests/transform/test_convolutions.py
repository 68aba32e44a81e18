"""Convolutions in groups: the numbers of the merged kernel, by programs that do not grow with the number of groups."""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax_kit as lk
from tests.draws import draw, moved


def setup(groups, method=lk.LoRA):
    def fn(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    params, x = {"w": draw(0, 3, 2, 2, 2 * groups)}, draw(1, 2, 5, 4, 2 * groups)
    plan = lk.resolve(lk.Spec({"w": method(rank=2)}), params, fn, x)
    base, factors = lk.split(params, plan, jax.random.key(0))
    return fn, plan, base, moved(factors), x


@pytest.mark.parametrize("method", [lk.LoRA, lk.DoRA])
@pytest.mark.parametrize("groups", [1, 3])
def test_grouped_convolutions_equal_the_merged_kernel(groups, method):
    fn, plan, base, factors, x = setup(groups, method)
    adapted = lk.adapt(fn, plan)
    np.testing.assert_allclose(adapted(base, factors, x), fn(lk.merge(base, factors, plan), x), atol=2e-4)
    if method is lk.LoRA:  # DoRA detaches its norm, which merge does not
        ours = jax.grad(lambda f: jnp.sum(jnp.sin(adapted(base, f, x))))(factors)["w"]
        theirs = jax.grad(lambda f: jnp.sum(jnp.sin(fn(lk.merge(base, f, plan), x))))(factors)["w"]
        for g, h in ((ours.a, theirs.a), (ours.b, theirs.b)):
            np.testing.assert_allclose(g, h, atol=1e-4 * float(jnp.abs(h).max()))


def equations(jaxpr):
    inner = [getattr(j, "jaxpr", j) for eqn in jaxpr.eqns for j in jex.jaxprs_in_params(eqn.params)]
    return len(jaxpr.eqns) + sum(map(equations, inner))


def test_programs_do_not_grow_with_the_number_of_groups():
    """A depthwise layer of MobileNetV2 has up to 960; a slice for each is what its gradient took to compile."""
    sizes = []
    for groups in (3, 48):
        fn, plan, base, factors, x = setup(groups)
        loss = lambda f, fn=fn, plan=plan, base=base, x=x: jnp.sum(lk.adapt(fn, plan)(base, f, x))  # noqa: E731
        sizes.append(equations(jax.make_jaxpr(jax.grad(loss))(factors).jaxpr))
    assert sizes[0] == sizes[1]
