"""The order in which equations run: each once, products of one input together, and of one input alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.transform.interpreter.schedule import schedule
from tests.draws import draw

PARAMS = {"q": 0.3 * draw(0, 8, 6), "k": 0.3 * draw(1, 6, 8), "v": 0.3 * draw(2, 8, 6)}
X, Y = draw(3, 64, 8), draw(4, 64, 8)  # as many tokens as are joined


def attention(p, x, y):
    q = jnp.tanh(x @ p["q"])
    return q * (x @ p["k"].T) + x @ p["v"]


def siamese(p, x, y):
    """Each parameter is multiplied with two inputs, which are all there when the first product runs."""
    return jnp.tanh(x @ p["q"]) * (y @ p["q"]), x @ p["k"].T + y @ p["k"].T, y @ p["v"]


def order(fn, **kwargs):
    jaxpr = jax.make_jaxpr(fn)(PARAMS, X, Y).jaxpr
    steps = list(schedule(jaxpr.eqns, jaxpr.invars[: len(PARAMS)], **kwargs))
    assert sorted(id(eqn) for step in steps for eqn in step.eqns) == sorted(map(id, jaxpr.eqns))
    assert all(step.eqns[0] is jaxpr.eqns[step.number] for step in steps)
    there = {*jaxpr.invars, *jaxpr.constvars}
    for step in steps:
        assert {v for eqn in step.eqns for v in eqn.invars if not hasattr(v, "val")} <= there
        there |= {v for eqn in step.eqns for v in eqn.outvars}
    return [" ".join(eqn.primitive.name for eqn in step.eqns) for step in steps]


def test_products_of_one_input_run_where_the_first_stood():
    assert order(attention) == ["transpose", "dot_general dot_general dot_general", "tanh", "mul", "add"]
    assert order(attention, join=False)[:3] == ["dot_general", "tanh", "transpose"]


def test_products_of_one_parameter_stay_apart():
    """x q and x k, y q and y k and y v; the second transpose of k is no other than the first."""
    assert sorted(order(siamese)) == sorted(
        [
            "transpose",
            "transpose",
            "dot_general dot_general",
            "dot_general dot_general dot_general",
            "tanh",
            "mul",
            "add",
        ]
    )


def test_what_a_block_keeps_is_marked():
    jaxpr = jax.make_jaxpr(attention)(PARAMS, X, Y).jaxpr
    kept = {id(eqn) for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"}
    for step in schedule(jaxpr.eqns, jaxpr.invars[: len(PARAMS)], kept):
        assert step.kept == (step.eqns[0].primitive.name == "dot_general")


@pytest.mark.parametrize("recompute", [True, False, "everything"])
@pytest.mark.parametrize("fn", [attention, siamese])
def test_joined_products_equal_the_merged(fn, recompute):
    plan = lk.resolve(lk.Spec({"*": lk.LoRA(rank=2)}), PARAMS, fn, X, Y)
    base, factors = lk.split(PARAMS, plan, jax.random.key(0))
    factors = jax.tree.map(lambda x: x + 0.1, factors)

    def total(out):
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(out))

    for kernel in ("factored", "merged", "plain"):
        adapted = lk.adapt(fn, plan, kernel=kernel, recompute=recompute)
        said = str(lk.explain(adapted, base, factors, X, Y))
        assert ("more that read the same input" in said) == (kernel != "plain")
        ours = jax.jit(jax.value_and_grad(lambda f, a=adapted: total(a(base, f, X, Y))))(factors)
        theirs = jax.value_and_grad(lambda f: total(fn(lk.merge(base, f, plan), X, Y)))(factors)
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


def test_a_result_that_the_forward_pass_did_not_keep_is_an_error():
    from lorax_kit.transform.interpreter.tape import Player, Recorder

    tape = Recorder()
    tape.at(3).run(jnp.sin, 1.0)
    tape.at(3).at(1).run(jnp.cos, 1.0)
    assert sorted(tape.results) == [(3, 0), (3, 1, 0)]
    player = Player(tape.results)
    assert float(player.at(3).at(1).run(jnp.cos, 1.0)) == pytest.approx(np.cos(1.0))
    with pytest.raises(KeyError):
        player.at(2).run(jnp.sin, 1.0)
