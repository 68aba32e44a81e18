"""Real modules of each library: nothing is materialised, and every number is that of the merged parameters.

A case is a function of (params, *inputs) whose outputs include whatever state the module updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax_kit as lk
from lorax_kit.core.paths import is_array
from tests.draws import draw, moved

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Module(NamedTuple):
    frontend: str
    primitive: str
    params: Any
    fn: Callable[..., Any]
    inputs: tuple[Any, ...]
    targets: tuple[str, ...]


X = draw(1, 2, 6, 8)
IDS = jnp.arange(12).reshape(2, 6) % 11
KERNELS = ("**/kernel",)


def linen(model, *inputs, targets=KERNELS, mutable=(), rngs=()):
    """A linen module as a function of its params; other collections pass through, updated ones come out."""
    keys = {name: jax.random.key(i) for i, name in enumerate(("params", *rngs))}
    with jax.numpy_rank_promotion("allow"):
        variables = dict(model.init(keys, *inputs))
    params = variables.pop("params")

    def fn(params, state, *inputs):
        own = {name: jax.random.key(7) for name in rngs}
        with jax.numpy_rank_promotion("allow"):
            return model.apply({"params": params, **state}, *inputs, rngs=own, mutable=list(mutable))

    return params, fn, (variables, *inputs), targets


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, c, _):
                return c + nn.gelu(nn.Dense(8)(nn.LayerNorm()(c))), None

        stack = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(name="stack")(x, None)[0]


class Stateful(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Conv(8, (3,))(x))
        return nn.Dense(4)(nn.Dropout(0.5, deterministic=False)(x))


def module_nnx(build, *inputs, targets=KERNELS):
    model = build(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params, rest, *inputs):
        module = nnx.merge(graph, params, rest, copy=True)
        with jax.numpy_rank_promotion("allow"):
            out = module(*inputs)
        return out, nnx.state(module, nnx.BatchStat)

    return params, fn, (rest, *inputs), tuple(f"{t}/value" if t.endswith("kernel") else t for t in targets)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs)
        self.out = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.conv(x))
        return self.out(self.attend(x, x))


class NnxEmbedding(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Embed(11, 8, rngs=rngs)
        self.up = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, ids):
        return self.table.attend(nnx.gelu(self.up(self.table(ids))))


def equinox_module(model, fn, *inputs, targets=("**/weight",)):
    return model, fn, inputs, targets


def haiku(net, *inputs, targets, state=False):
    made = hk.transform_with_state(net)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        params, kept = made.init(jax.random.PRNGKey(0), *inputs)

    def fn(params, kept, *inputs):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return made.apply(params, kept, jax.random.PRNGKey(3), *inputs)

    return params, fn, (kept, *inputs), targets


def haiku_net(x):
    x = hk.BatchNorm(True, True, 0.9)(hk.Conv1D(8, 3)(x), is_training=True)
    x = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling())(x, x, x)
    return hk.Linear(4)(hk.dropout(hk.next_rng_key(), 0.5, x))


def haiku_recurrent(ids):
    x = hk.Embed(11, 8)(ids)
    return hk.dynamic_unroll(hk.LSTM(8), x, hk.LSTM(8, name="unused").initial_state(2), time_major=False)[0]


def attention_by_hand(p, x):
    """The multi-head attention that no library wraps: einsums, a fused projection, a slice."""
    qkv = jnp.einsum("btd,dshk->sbthk", x, p["qkv"])
    weights = jax.nn.softmax(jnp.einsum("bqhk,bthk->bhqt", qkv[0], qkv[1]))
    return jnp.einsum("bhqt,bthk,hkd->bqd", weights, qkv[2], p["out"])


def cases() -> dict[str, Callable[[], Module]]:
    """Built when asked for: name -> module."""
    key = jax.random.key(0)
    scaled = lambda *shape: draw(0, *shape) / shape[0] ** 0.5  # noqa: E731
    lstm = lambda: nn.RNN(nn.LSTMCell(8))  # noqa: E731
    return {
        "linen Dense": lambda: Module("linen", "Dense", *linen(nn.Dense(5), X)),
        "linen DenseGeneral": lambda: Module(
            "linen", "DenseGeneral", *linen(nn.DenseGeneral((2, 3), axis=(-2, -1)), X)
        ),
        "linen attention": lambda: Module(
            "linen", "attention", *linen(nn.MultiHeadDotProductAttention(2, qkv_features=8), X, X)
        ),
        "linen Conv": lambda: Module("linen", "Conv", *linen(nn.Conv(6, (3,), strides=2, feature_group_count=2), X)),
        "linen ConvTranspose": lambda: Module(
            "linen", "ConvTranspose", *linen(nn.ConvTranspose(6, (3,), strides=(2,)), X)
        ),
        "linen Embed": lambda: Module("linen", "Embed", *linen(nn.Embed(11, 8), IDS, targets=("embedding",))),
        "linen LSTM": lambda: Module("linen", "LSTM", *linen(lstm(), X)),
        "linen optimised LSTM": lambda: Module("linen", "LSTM", *linen(nn.RNN(nn.OptimizedLSTMCell(8)), X)),
        "linen GRU": lambda: Module("linen", "GRU", *linen(nn.RNN(nn.GRUCell(8)), X)),
        "linen scan and remat": lambda: Module("linen", "scan, remat", *linen(Scanned(), X)),
        "linen state and dropout": lambda: Module(
            "linen", "state, rngs", *linen(Stateful(), X, mutable=("batch_stats",), rngs=("dropout",))
        ),
        "nnx network with state": lambda: Module("nnx", "state", *module_nnx(NnxNet, X)),
        "nnx tied embedding": lambda: Module(
            "nnx", "Embed", *module_nnx(NnxEmbedding, IDS, targets=("**/kernel", "table/embedding/value"))
        ),
        "equinox MLP": lambda: Module(
            "equinox",
            "Linear",
            *equinox_module(eqx.nn.MLP(8, 3, 8, 2, key=key), lambda m, x: jax.vmap(jax.vmap(m))(x), X),
        ),
        "equinox attention": lambda: Module(
            "equinox",
            "attention",
            *equinox_module(
                eqx.nn.MultiheadAttention(2, 8, key=key), lambda m, x: jax.vmap(lambda y: m(y, y, y))(x), X
            ),
        ),
        "equinox Conv": lambda: Module(
            "equinox",
            "Conv",
            *equinox_module(eqx.nn.Conv1d(6, 4, 3, key=key), lambda m, x: jax.vmap(m)(x), X, targets=("weight",)),
        ),
        "equinox LSTM": lambda: Module(
            "equinox",
            "LSTM",
            *equinox_module(
                eqx.nn.LSTMCell(8, 4, key=key),
                lambda m, x: jax.lax.scan(lambda c, y: (m(y, c), None), (jnp.zeros(4), jnp.zeros(4)), x[0])[0],
                X,
                targets=("weight_*",),
            ),
        ),
        "haiku network with state": lambda: Module("haiku", "state, rngs", *haiku(haiku_net, X, targets=("**/w",))),
        "haiku LSTM": lambda: Module(
            "haiku", "LSTM", *haiku(haiku_recurrent, IDS, targets=("lstm/linear/w", "embed/embeddings"))
        ),
        "plain attention": lambda: Module(
            "plain",
            "attention",
            {"qkv": scaled(8, 3, 2, 4), "out": scaled(2, 4, 8)},
            attention_by_hand,
            (X,),
            ("{qkv,out}",),
        ),
    }


CASES = cases()


def prepare(name):
    case = CASES[name]()
    spec = lk.Spec(dict.fromkeys(case.targets, lk.LoRA(rank=2, alpha=3)))
    plan = lk.resolve(spec, case.params, case.fn, *case.inputs)
    base, factors = lk.split(case.params, plan, jax.random.key(1))
    return case, plan, base, moved(factors), lk.adapt(case.fn, plan)


def arrays(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree) if is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)]


@pytest.mark.parametrize("name", CASES)
def test_modules_run_factored_and_equal_the_merged(name, record_property):
    case, plan, base, factors, adapted = prepare(name)
    assert lk.explain(adapted, base, factors, *case.inputs).materialised == ()
    call = (lambda fn: fn) if case.frontend == "equinox" else jax.jit  # its models hold functions, which jit refuses
    ours = call(adapted)(base, factors, *case.inputs)
    theirs = call(case.fn)(lk.merge(base, factors, plan), *case.inputs)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(arrays(ours), arrays(theirs), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * max(np.abs(y).max(), 1.0))  # fp32 sums in another order
    record_property("coverage", (case.primitive, case.frontend, "merged"))


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_modules_equal_autodiff_through_the_merged(name, record_property):
    case, plan, base, factors, adapted = prepare(name)

    def loss(out):
        return sum(
            jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(out) if is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
        )

    ours = jax.jit(jax.grad(lambda f: loss(adapted(base, f, *case.inputs))))(factors)
    theirs = jax.jit(jax.grad(lambda f: loss(case.fn(lk.merge(base, f, plan), *case.inputs))))(factors)
    largest = max(np.abs(y).max() for y in arrays(theirs))
    for x, y in zip(arrays(ours), arrays(theirs), strict=True):
        np.testing.assert_allclose(x, y, atol=5e-5 * largest)
        assert np.abs(x).max() > 0
    record_property("coverage", (case.primitive, case.frontend, "grad"))
