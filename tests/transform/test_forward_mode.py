"""Forward mode: the plain kernel has it, and where a derivative is written for reverse mode the error says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.core.lowrank import LowRank
from lorax_kit.models import BertConfig, BertEncoder, LlamaConfig, LlamaModel
from lorax_kit.transform import compressed
from tests.draws import draw, moved

PARAMS, X = {"u": draw(0, 6, 5), "v": draw(1, 5, 3)}, draw(2, 4, 6)


def fn(p, x):
    return jnp.tanh(x @ p["u"]) @ p["v"]


def slope(f, x):
    """The derivative of the sum of f along a direction of ones, by jvp."""
    return jax.jvp(lambda x: jnp.sum(jnp.sin(f(x))), (x,), (jax.tree.map(jnp.ones_like, x),))[1]


@pytest.mark.parametrize("method", [lk.LoRA, lk.DoRA])
@pytest.mark.parametrize("quantised", [False, True])
def test_the_error_names_the_kernel_that_has_it(method, quantised):
    params = lk.quantize(PARAMS, ["u", "v"], "int8") if quantised else PARAMS
    plan = lk.resolve(lk.Spec({"{u,v}": method(rank=2)}), params, fn, X)
    base, factors = lk.split(params, plan, jax.random.key(0))
    factors = moved(factors)
    with pytest.raises(lk.PlanError, match=r"reverse mode.\n  adapt\(fn, plan, kernel='plain'\)"):
        slope(lambda f: lk.adapt(fn, plan)(base, f, X), factors)
    plain = lk.adapt(fn, plan, kernel="plain")
    expected = slope(lambda f: fn(lk.merge(base, f, plan), X), factors)
    np.testing.assert_allclose(slope(lambda f: plain(base, f, X), factors), expected, rtol=1e-4)
    # Gradients differentiated forward (Hessians) need another kernel only over a quantised base.
    if quantised:
        return
    curved = jax.jvp(jax.grad(lambda f: jnp.sum(lk.adapt(fn, plan)(base, f, X) ** 2)), (factors,), (factors,))[1]
    theirs = jax.jvp(jax.grad(lambda f: jnp.sum(fn(lk.merge(base, f, plan), X) ** 2)), (factors,), (factors,))[1]
    for x, y in zip(jax.tree.leaves(curved), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * float(jnp.abs(y).max()))


def test_the_same_of_compressed_functions():
    a, b = draw(3, 2, 6), draw(4, 2, 5)
    params = PARAMS | {"u": LowRank(a=a, b=b, shape=(6, 5), dtype=jnp.float32)}
    with pytest.raises(lk.PlanError, match=r"reverse mode.\n  compressed\(fn, kernel='plain'\)"):
        slope(lambda v: compressed(fn)(params | {"v": v}, X + jnp.sum(v)), PARAMS["v"])
    got = slope(lambda v: compressed(fn, kernel="plain")(params | {"v": v}, X + jnp.sum(v)), PARAMS["v"])
    dense = PARAMS | {"u": a.T @ b}
    np.testing.assert_allclose(got, slope(lambda v: fn(dense | {"v": v}, X + jnp.sum(v)), PARAMS["v"]), rtol=1e-4)


IDS = jnp.arange(6)[None]
SIZES = {"vocab_size": 7, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
MODELS = {
    "BERT": BertEncoder(BertConfig(**SIZES, max_position_embeddings=8)),
    "LLaMA": LlamaModel(LlamaConfig(**SIZES, max_position_embeddings=8, num_key_value_heads=1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_have_a_plain_form_of_the_same_values(name):
    model, mask = MODELS[name], jnp.ones((1, 6))
    params = model.init(jax.random.key(0), IDS, mask)["params"]
    plain = model.clone(plain=True)
    call = lambda model: lambda p: model.apply({"params": p}, IDS, mask)  # noqa: E731
    np.testing.assert_array_equal(call(plain)(params), call(model)(params))
    with pytest.raises(TypeError, match=r"model.clone\(plain=True\)"):
        slope(call(model), params)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(call(model)(p)))))(params)
    by_reverse = sum(float(jnp.sum(x)) for x in jax.tree.leaves(grads))
    assert float(jax.jit(lambda p: slope(call(plain), p))(params)) == pytest.approx(by_reverse, rel=1e-3, abs=1e-4)
    # Adapted, too: the kernel is ours, the rule is the model's.
    spec, apply = lk.Spec({"**/query/kernel": lk.LoRA(rank=1)}), lambda p: call(model)(p)
    plan = lk.resolve(spec, params, apply)
    base, factors = lk.split(params, plan, jax.random.key(1))
    with pytest.raises(lk.PlanError, match=r"the function itself.*\n.*model.clone\(plain=True\)"):
        slope(lambda f: lk.adapt(apply, plan, kernel="plain")(base, f), factors)
