"""Dropout of a site acts on the input of its low-rank path, or the use says that there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax_kit as lk
from lorax_kit.core.leaves import site_key
from tests.draws import moved
from tests.transform.uses import CASES, CONV

KEY = jax.random.key(5)
RATE = 0.4
NOTE = "dropout has no input to act on here"


def prepare(case, dropout=RATE, base_is=1.0, variant="lora"):
    plan = lk.resolve(
        lk.Spec({"*": lk.LoRA(rank=2, dropout=dropout, variant=variant)}), case.params, case.fn, *case.inputs
    )
    base, factors = lk.split(jax.tree.map(lambda x: base_is * x, case.params), plan, KEY)
    return plan, base, moved(factors), lk.adapt(case.fn, plan)


CONVOLUTIONS = [name for name, case in CASES.items() if case.primitive == CONV and not case.materialised]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_drops_inputs_of_its_low_rank_path_only(name):
    """W x + dW (mask x / (1 - p)), by two convolutions of the model's own."""
    case = CASES[name]
    plan, base, factors, adapted = prepare(case)
    (x,) = case.inputs
    kept = jax.random.bernoulli(site_key(KEY, "w"), 1 - RATE, x.shape)
    delta = lk.merge(jax.tree.map(jnp.zeros_like, base), factors, plan)
    expected = case.fn(base, x) + case.fn(delta, jnp.where(kept, x / (1 - RATE), 0))
    got = adapted(base, factors, x, dropout_key=KEY)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert float(jnp.abs(got - adapted(base, factors, x)).max()) > 0.1


def test_dropout_of_a_convolution_keeps_the_mean():
    case = CASES["conv 2d, channels first"]
    _, base, factors, adapted = prepare(case, dropout=0.5, base_is=0.0)
    wet = jax.vmap(lambda key: adapted(base, factors, *case.inputs, dropout_key=key))(jax.random.split(KEY, 4000))
    error = jnp.std(wet, axis=0) / 4000**0.5
    assert float(jnp.abs((wet.mean(0) - adapted(base, factors, *case.inputs)) / error).max()) < 5


def test_gradients_of_a_convolution_are_those_of_the_dropped_input():
    case = CASES["conv 1d, groups"]
    plan, base, factors, adapted = prepare(case)
    (x,) = case.inputs
    wet = jnp.where(jax.random.bernoulli(site_key(KEY, "w"), 1 - RATE, x.shape), x / (1 - RATE), 0)
    zero = jax.tree.map(jnp.zeros_like, base)
    ours = jax.grad(lambda f: jnp.sum(jnp.sin(adapted(base, f, x, dropout_key=KEY))))(factors)
    theirs = jax.grad(lambda f: jnp.sum(jnp.sin(case.fn(base, x) + case.fn(lk.merge(zero, f, plan), wet))))(factors)
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


UNDROPPED = {
    **dict.fromkeys(("embedding", "embedding of heads", "columns", "take, filled"), "lookup"),
    **dict.fromkeys(("flat", "masked", "tanh of it", "added to the input", "conv, batch groups"), "materialised"),
    # Each of the joined has a mask of its own, so that they cannot run as one.
    **dict.fromkeys(("fused qkv, joined", "the sum of two"), "materialised"),
}


@pytest.mark.parametrize("name", UNDROPPED)
def test_a_use_without_an_input_says_that_dropout_does_nothing(name):
    case = CASES[name]
    _, base, factors, adapted = prepare(case)
    rows = lk.explain(adapted, base, factors, *case.inputs, dropout_key=KEY).rows
    assert {r.how for r in rows} == {UNDROPPED[name]}
    assert all(r.reason.endswith(NOTE) for r in rows)
    with pytest.warns(UserWarning, match="dropout does nothing at"):
        wet = adapted(base, factors, *case.inputs, dropout_key=KEY)
    np.testing.assert_allclose(wet, adapted(base, factors, *case.inputs), atol=2e-5)


@pytest.mark.parametrize(
    "name", ["x @ w", "experts", "one-hot lookup", "scanned layers", "experts by index", *CONVOLUTIONS]
)
def test_a_use_with_an_input_drops_and_says_nothing(name):
    case = CASES[name]
    _, base, factors, adapted = prepare(case)
    text = str(lk.explain(adapted, base, factors, *case.inputs, dropout_key=KEY))
    assert NOTE not in text
    wet, dry = (adapted(base, factors, *case.inputs, **k) for k in ({"dropout_key": KEY}, {}))
    assert float(jnp.abs(wet - dry).max()) > 1e-2


def test_a_tied_table_says_it_of_the_lookup_alone():
    case = CASES["embedding, tied"]
    _, base, factors, adapted = prepare(case)
    rows = lk.explain(adapted, base, factors, *case.inputs, dropout_key=KEY).rows
    assert {r.how: NOTE in r.reason for r in rows} == {"lookup": True, "factored": False}


@pytest.mark.parametrize(("dropout", "keywords"), [(RATE, {}), (0.0, {"dropout_key": KEY})])
def test_an_evaluation_or_a_site_without_dropout_says_nothing(dropout, keywords):
    case = CASES["embedding"]
    _, base, factors, adapted = prepare(case, dropout=dropout)
    assert NOTE not in str(lk.explain(adapted, base, factors, *case.inputs, **keywords))


def test_magnitudes_of_a_convolution_scale_the_dropped_update_too():
    case = CASES["conv 1d"]
    plan, base, factors, adapted = prepare(case, variant="dora")
    (x,) = case.inputs
    kept = jax.random.bernoulli(site_key(KEY, "w"), 1 - RATE, x.shape)
    f = factors["w"]
    delta = plan.site("w").scale * jnp.einsum("rij,ro->ijo", f.a, f.b)
    column = f.magnitude / jnp.linalg.norm((base["w"] + delta).reshape(-1, 6), axis=0)
    dims = ("NWC", "WIO", "NWC")
    conv = lambda w, x: lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=dims)  # noqa: E731
    expected = column[None, None] * (conv(base["w"], x) + conv(delta, jnp.where(kept, x / (1 - RATE), 0)))
    np.testing.assert_allclose(adapted(base, factors, x, dropout_key=KEY), expected, atol=5e-5)
