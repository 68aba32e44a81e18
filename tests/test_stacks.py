"""No LAPACK call of a stack of matrices: two at once wait for each other's threads in jaxlib 0.10, forever."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.analysis import delta_spectrum
from lorax_kit.arrays.svd import one_by_one
from tests.draws import draw
from tests.methods.table import WAYS

CALL = re.compile(r"custom_call @(lapack_\w+)\([^)]*\)[^\n]*: \(tensor<([0-9x]+)x[a-z0-9]+>")
PARAMS, X = {"w": draw(0, 3, 6, 6), "v": draw(1, 6, 6)}, draw(2, 4, 6)


def fn(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0] @ p["v"]


def stacked(text):
    """The LAPACK calls of a lowered program that are given more than one matrix."""
    return [(name, shape) for name, shape in CALL.findall(text) if shape.count("x") > 1]


def test_a_call_of_a_stack_is_found():
    assert stacked(jax.jit(jnp.linalg.eigh).lower(jnp.ones((3, 2, 2))).as_text())
    one = jax.jit(one_by_one(jnp.linalg.eigh)).lower(jnp.ones((3, 2, 2))).as_text()
    assert CALL.search(one)
    assert not stacked(one)
    values = jax.vmap(one_by_one(jnp.linalg.eigvalsh))(jnp.stack([draw(i, 3, 2, 2) for i in range(2)]))
    expected = np.linalg.eigvalsh(
        np.stack([(np.asarray(x) + np.swapaxes(x, 1, 2)) / 2 for x in (draw(0, 3, 2, 2), draw(1, 3, 2, 2))])
    )
    np.testing.assert_allclose(values, expected, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_starts_and_steps_have_none(way):
    setting = WAYS[way]
    if way == "rows":
        pytest.skip("rows of a table")
    plan = lk.resolve(lk.Spec({"*": setting}), PARAMS, fn, X)
    hints = lk.calibrate(
        fn, PARAMS, plan, [X], loss=lambda y, x: jnp.sum(y), collect=["inputs", "gradient"], progress=False
    )
    start = jax.jit(lambda p: lk.split(p, plan, jax.random.key(0), hints=hints)[1])
    assert not stacked(start.lower(PARAMS).as_text())
    factors, adapted = start(PARAMS), lk.adapt(fn, plan)
    many = jax.tree.map(lambda x: jnp.stack([x, x]), factors)
    step = jax.vmap(jax.grad(lambda f: jnp.sum(adapted(PARAMS, f, X))))
    assert not stacked(jax.jit(step).lower(many).as_text())


def test_preconditioning_and_spectra_have_none():
    plan = lk.resolve(lk.Spec({"*": lk.LoRA(rank=2)}), PARAMS, fn, X)
    _, factors = lk.split(PARAMS, plan, jax.random.key(0))
    tx = optax.chain(lk.riemannian(plan), lk.partition(optax.sgd(0.1), plan))
    many = jax.tree.map(lambda x: jnp.stack([x, x]), factors)
    update = jax.vmap(lambda f: tx.update(f, tx.init(f), f)[0])
    assert not stacked(jax.jit(update).lower(many).as_text())
    spectrum = jax.jit(lambda a, b: delta_spectrum(a, b, batch_axes=1))
    assert not stacked(spectrum.lower(draw(3, 2, 4, 6), draw(4, 2, 4, 5)).as_text())
