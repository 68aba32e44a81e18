"""Recomputed blocks: the same numbers as without, half the temporaries, and nothing that must run once runs twice."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax_kit as lk
from lorax_kit.models import BertClassifier, BertConfig
from lorax_kit.transform.interpreter.blocks import blocks
from tests.draws import draw

KEY = jax.random.key(0)


class Model(NamedTuple):
    params: Any
    fn: Any
    inputs: tuple[Any, ...]
    rule: str = "*"
    setting: Mapping[str, Any] = MappingProxyType({})
    spec: Mapping[str, Any] = MappingProxyType({})
    key: Any = None


X = draw(9, 7, 6)
MLP = {"up": draw(0, 6, 10), "middle": draw(1, 10, 10), "down": draw(2, 10, 4)}


def mlp(p, x):
    h = jax.nn.gelu(x @ p["up"], approximate=False)
    return jax.nn.relu(h @ p["middle"]) @ p["down"]


def norm(x):
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def attend(p, x):
    shares = jax.nn.softmax((x @ p["q"]) @ (x @ p["k"]).T)
    return x + shares @ (x @ p["v"]) @ p["out"]


def transformer(p, x):
    x = norm(attend(p, x))
    return norm(x + jax.nn.gelu(x @ p["up"]) @ p["down"])


TRANSFORMER = {
    **{name: draw(i, 6, 6) for i, name in enumerate(("q", "k", "v", "out"))},
    "up": draw(4, 6, 12),
    "down": draw(5, 12, 6),
}


def lstm(p, x):
    def step(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x @ p["input"] + h @ p["state"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    start = jnp.zeros((x.shape[1], 4))
    return jnp.tanh(lax.scan(step, (start, start), x)[1]) @ p["out"]


def layers(p, x):
    return lax.scan(lambda x, w: (norm(x + jnp.tanh(x @ w["up"]) @ w["down"]), None), x, p)[0]


def dropping(p, x, key):
    h = jax.nn.gelu(x @ p["up"])
    h = jnp.where(jax.random.bernoulli(key, 0.5, h.shape), 2 * h, 0)
    return jax.nn.relu(h @ p["middle"]) @ p["down"]


def jitted(p, x):
    layer = jax.jit(lambda w, x: jax.nn.gelu(norm(x) @ w))
    return jnp.sin(layer(p["middle"], jnp.cos(layer(p["up"], jnp.sin(x))))) @ p["down"]


def jitted_twice(p, x):
    inner = jax.jit(lambda w, x: jnp.tanh(x @ w))
    layer = jax.jit(lambda p, x: jnp.cos(inner(p["middle"], jnp.sin(inner(p["up"], x)))))
    return jnp.exp(-layer(p, norm(x))) @ p["down"]


def checkpointed(p, x):
    h = jax.checkpoint(lambda p, x: jnp.tanh(jnp.sin(x) @ p["up"]) @ p["middle"])(p, norm(x))
    return jax.nn.relu(h) @ p["down"]


def masked(p, ids, where):
    """Integers and masks within, and from one block to a later one."""
    x = p["table"][ids]
    live = jnp.sum(x, -1, keepdims=True) > 0
    h = jnp.where(live, jnp.tanh(x @ p["up"]), 0)
    best = jnp.argmax(h, -1)
    h = jnp.where(live & where[:, None], jax.nn.gelu(h @ p["middle"]), 1)
    return jax.nn.one_hot(best, 10) * h @ p["down"], best


def experts(p, x, which):
    return jax.nn.gelu(jnp.einsum("ti,tio->to", norm(x), p["w"][which])) @ p["down"]


def convolved(p, x):
    conv = lambda x, w: lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))  # noqa: E731
    return jax.nn.gelu(conv(norm(x), p["first"])) @ p["second"]


def scaled(p, x):
    """A parameter times an array that was broadcast in an earlier block."""
    gains = jnp.broadcast_to(jnp.exp(x[0])[:, None], (6, 10))
    h = jax.nn.gelu(norm(x) @ p["up"])
    return jnp.sin(jnp.tanh(x) @ (p["up"] * gains) + h) @ p["down"]


def bert(layers=2, width=16, tokens=6, batch=3):
    config = BertConfig(
        vocab_size=32,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        max_position_embeddings=tokens,
    )
    model = BertClassifier(config, num_classes=3)
    ids = jax.random.randint(jax.random.fold_in(KEY, 1), (batch, tokens), 0, 32)
    mask = (jnp.arange(tokens)[None] < jnp.asarray([tokens, tokens - 1, tokens - 2] * batch)[:batch, None]).astype(int)
    params = model.init(KEY, ids, mask)["params"]
    return Model(
        params, lambda p, ids, mask: model.apply({"params": p}, ids, mask), (ids, mask), "**/layer_*/**/kernel"
    )


def half(x):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), x)


MODELS = {
    "mlp": Model(MLP, mlp, (X,)),
    "mlp, dora": Model(MLP, mlp, (X,), setting={"variant": "dora"}),
    "transformer": Model(TRANSFORMER, transformer, (X,)),
    "bert": bert(),
    "lstm": Model({"input": draw(0, 6, 16), "state": draw(1, 4, 16), "out": draw(2, 4, 3)}, lstm, (draw(3, 5, 2, 6),)),
    "scanned layers": Model({"up": draw(0, 3, 6, 8), "down": draw(1, 3, 8, 6)}, layers, (X,)),
    "dropout of sites": Model(TRANSFORMER, transformer, (X,), setting={"dropout": 0.5}, key=jax.random.key(3)),
    "dropout of the model": Model(MLP, dropping, (X, jax.random.key(4))),
    "dropout, old keys": Model(MLP, dropping, (X, jax.random.PRNGKey(4))),
    "inner jit": Model(MLP, jitted, (X,)),
    "jit in jit": Model(MLP, jitted_twice, (X,)),
    "checkpoint": Model(MLP, checkpointed, (X,)),
    "integers": Model({**MLP, "table": draw(5, 9, 6)}, masked, (jnp.arange(7), jnp.arange(7) < 5)),
    "experts by index": Model({"w": draw(0, 3, 6, 10), "down": draw(1, 10, 4)}, experts, (X, jnp.arange(7) % 3)),
    "convolution": Model({"first": draw(0, 3, 6, 8), "second": draw(1, 8, 4)}, convolved, (draw(2, 2, 5, 6),)),
    "times an array": Model({"up": draw(0, 6, 10), "down": draw(1, 10, 4)}, scaled, (X,)),
    "bf16": Model(half(TRANSFORMER), transformer, (half(X),)),
    "bf16, fp32 updates": Model(half(MLP), mlp, (half(X),), spec={"compute_dtype": "float32"}),
}


def prepare(model, kernel="auto"):
    """(base, factors away from a zero update, adapted with and without recomputation, keywords)."""
    spec = lk.Spec({model.rule: lk.LoRA(rank=2, **model.setting)}, **model.spec)
    plan = lk.resolve(spec, model.params, model.fn, *model.inputs)
    base, factors = lk.split(model.params, plan, KEY)
    factors = jax.tree.map(lambda x: x + 0.2 * draw(x.size, *x.shape).astype(x.dtype), factors)
    both = [lk.adapt(model.fn, plan, kernel=kernel, recompute=on) for on in (True, False)]
    return base, factors, both, {} if model.key is None else {"dropout_key": model.key}


def loss(out):
    return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in jax.tree.leaves(out))


def assert_close(ours, theirs, of_largest):
    """Each array within a share of its largest entry."""
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.isfinite(y).all()
        assert np.abs(y).max() > 0
        np.testing.assert_allclose(x, y, rtol=0, atol=of_largest * np.abs(y).max())


@pytest.mark.parametrize(
    ("name", "kernel"),
    [*((name, "factored") for name in MODELS), *((n, "merged") for n in ("mlp", "bert", "lstm", "jit in jit"))],
)
def test_losses_and_gradients_as_without(name, kernel):
    model = MODELS[name]
    base, factors, both, keywords = prepare(model, kernel)
    losses = [lambda f, fn=fn: loss(fn(base, f, *model.inputs, **keywords)) for fn in both]
    found = [jax.jit(jax.value_and_grad(one))(factors) for one in losses]
    # XLA fuses, and sums in another order; bf16: some roundings (2^-8 each) of sums of cotangents.
    assert_close(*found, 0.1 if name.startswith("bf16") else 1e-5)


@pytest.mark.parametrize("name", ["mlp", "inner jit", "bf16"])
def test_outside_jit_outputs_are_the_same_bits(name):
    model = MODELS[name]
    base, factors, both, _ = prepare(model)
    ours, theirs = (jax.tree.leaves(fn(base, factors, *model.inputs)) for fn in both)
    for x, y in zip(ours, theirs, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    grads = [jax.grad(lambda f, fn=fn: loss(fn(base, f, *model.inputs)))(factors) for fn in both]
    assert_close(*grads, 2e-2 if name == "bf16" else 1e-6)


@pytest.mark.parametrize("name", ["mlp", "bert", "inner jit", "dropout of sites"])
def test_stacked_factors_under_vmap(name):
    model = MODELS[name]
    base, factors, both, keywords = prepare(model)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, -x]), factors)
    losses = [lambda f, fn=fn: loss(fn(base, f, *model.inputs, **keywords)) for fn in both]
    ours, theirs = (jax.jit(jax.vmap(jax.grad(one)))(stacked) for one in losses)
    assert_close(ours, theirs, 1e-5)
    one = jax.jit(jax.grad(losses[0]))
    alone = [one(jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(3)]
    assert_close(ours, jax.tree.map(lambda *x: jnp.stack(x), *alone), 1e-4)


@pytest.mark.parametrize(
    ("name", "jit"), [("mlp", False), *((name, True) for name in ("mlp", "transformer", "lstm", "inner jit"))]
)
def test_gradient_of_the_gradients_norm(name, jit):
    model = MODELS[name]
    base, factors, both, _ = prepare(model)

    def curvature(fn):
        one = jax.grad(lambda f: loss(fn(base, f, *model.inputs)))
        two = jax.grad(lambda f: jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(one(f)))))
        return (jax.jit(two) if jit else two)(factors)

    assert_close(*(curvature(fn) for fn in both), 1e-4)


def test_gradients_of_the_inputs_and_of_the_base():
    base, factors, both, _ = prepare(MODELS["transformer"])
    grads = [jax.jit(jax.grad(lambda b, x, fn=fn: loss(fn(b, factors, x)), (0, 1)))(base, X) for fn in both]
    assert_close(*grads, 1e-5)


def test_half_of_the_temporaries_at_the_same_flops():
    model = bert(layers=4, width=64, tokens=64, batch=8)
    base, factors, both, _ = prepare(model)
    grads = [jax.jit(jax.grad(lambda f, fn=fn: loss(fn(base, f, *model.inputs)))) for fn in both]
    ours, theirs = (g.lower(factors).compile() for g in grads)
    held = [c.memory_analysis().temp_size_in_bytes for c in (ours, theirs)]
    assert held[0] <= 0.75 * held[1]
    assert ours.cost_analysis()["flops"] <= 1.05 * theirs.cost_analysis()["flops"]


def cut(fn, *args):
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return jaxpr, blocks(jaxpr, set(jaxpr.invars[:1]))


def names(eqns):
    return [eqn.primitive.name for eqn in eqns]


def feed_forward(w, x):
    """Three products; few bytes are alive between the second and the third."""
    h = jnp.tanh(x @ w)  # (5, 3) to (5, 40)
    y = jnp.sin(h @ w.T)
    return jnp.cos(jnp.exp(y) @ w)


def test_cuts_where_the_fewest_bytes_are_alive():
    jaxpr, found = cut(feed_forward, jnp.zeros((3, 40)), jnp.zeros((5, 3)))
    assert [names(b.eqns) for b in found] == [
        ["dot_general", "tanh", "transpose", "dot_general"],
        ["sin", "exp", "dot_general", "cos"],
    ]
    first, second = found
    (narrow,) = first.writes
    assert narrow.aval.shape == (5, 3)
    assert set(first.reads) == set(jaxpr.invars)
    assert second.reads == [narrow, jaxpr.invars[0]]
    assert second.writes == list(jaxpr.outvars)
    assert first.recomputed
    assert second.recomputed
    assert [[n for e, n in zip(b.eqns, names(b.eqns), strict=True) if id(e) in b.kept] for b in found] == [
        ["dot_general", "dot_general"],
        ["dot_general"],
    ]


@pytest.mark.parametrize("name", MODELS)
def test_every_equation_is_in_one_block_and_blocks_read_what_is_there(name):
    model = MODELS[name]
    jaxpr, found = cut(model.fn, model.params, *model.inputs)
    assert [id(e) for b in found for e in b.eqns] == [id(e) for e in jaxpr.eqns]
    there = {*jaxpr.invars, *jaxpr.constvars}
    for block in found:
        assert block.kept <= {id(e) for e in block.eqns}
        assert set(block.reads) <= there
        made = {v for e in block.eqns for v in e.outvars}
        assert set(block.writes) <= made
        there.update(block.writes)
    assert {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)} <= there


def with_effects(w, x):
    h = jnp.tanh(x @ w)
    jax.debug.print("mean {}", jnp.mean(h))
    h = jnp.sin(h) @ w.T
    h = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h), jnp.exp(h))
    h = lax.while_loop(lambda h: jnp.sum(h) > 1, lambda h: h / 2, h)
    return jnp.cos(lax.cond(jnp.sum(h) > 0, jnp.sin, jnp.cos, h) @ w)


def test_effects_and_control_flow_are_in_no_recomputed_block():
    _, found = cut(with_effects, jnp.ones((3, 4)), jnp.ones((5, 3)))
    ran_once = [b for b in found if {"debug_print", "debug_callback", "scan", "while", "cond"} & set(names(b.eqns))]
    assert [len(b.eqns) for b in ran_once] == [1, 1, 1, 1]
    assert not any(b.recomputed for b in ran_once)
    assert any(b.recomputed for b in found)


@pytest.mark.parametrize("recompute", [True, False])
def test_an_effect_runs_once(recompute, capfd):
    params = {"w": draw(0, 6, 6)}

    def fn(p, x):
        h = jnp.tanh(norm(x) @ p["w"])
        jax.debug.print("passed")
        return jnp.sin(h) @ p["w"]

    base, factors, both, _ = prepare(Model(params, fn, (X,)))
    ours = both[not recompute]
    jax.block_until_ready(jax.jit(jax.grad(lambda f: loss(ours(base, f, X))))(factors))
    jax.effects_barrier()
    assert capfd.readouterr().out.count("passed") == 1


def products(fn, *args):
    """Products that a compiled function runs."""
    return jax.jit(fn).lower(*args).compile().as_text().count(" dot(")


@pytest.mark.parametrize("name", ["mlp", "transformer", "inner jit", "jit in jit"])
def test_no_product_runs_twice(name):
    model = MODELS[name]
    base, factors, both, _ = prepare(model, kernel="factored")
    ours, theirs = (products(jax.grad(lambda f, fn=fn: loss(fn(base, f, *model.inputs))), factors) for fn in both)
    assert ours == theirs > 5
