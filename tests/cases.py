"""One table of models for the contracts: name -> (params, function, inputs, patterns of low-rank targets)."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.draws import draw


class Case(NamedTuple):
    params: Any
    fn: Any
    inputs: tuple
    targets: tuple[str, ...]


class Tied(nn.Module):
    """Embedding, N-D attention kernels, a scanned and rematerialised stack, a tied head."""

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(11, 8, name="table")
        x = table(ids)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x, x)

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, c, _):
                return c + nn.gelu(nn.Dense(8)(c)), None

        stack = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="stack")(x, None)
        return table.attend(x)


def mlp() -> Case:
    params = {"up": {"kernel": draw(0, 6, 9)}, "down": {"kernel": draw(1, 9, 4), "bias": draw(2, 4)}}

    def fn(p, x):
        return jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"] + p["down"]["bias"][None]

    return Case(params, fn, (draw(3, 5, 6),), ("**/kernel",))


def tied() -> Case:
    model, ids = Tied(), jnp.arange(6).reshape(2, 3)
    params = model.init(jax.random.key(0), ids)["params"]
    return Case(params, lambda p, ids: model.apply({"params": p}, ids), (ids,), ("**/kernel", "table/embedding"))


def experts() -> Case:
    params = {"w": draw(0, 3, 5, 4), "v": draw(1, 4, 3, 5)}

    def fn(p, x):
        return jnp.einsum("enh,hek->enk", jnp.einsum("end,edh->enh", x, p["w"]), p["v"])

    return Case(params, fn, (draw(2, 3, 7, 5),), ("{w,v}",))


def equinox() -> Case:
    model = eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(0))
    return Case(model, lambda m, x: jax.vmap(m)(x), (draw(1, 5, 4),), ("layers/*/weight",))


def custom_rules() -> Case:
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    params = {"w": draw(0, 4, 5), "v": draw(1, 5, 3)}

    def fn(p, x):
        return jax.jit(lambda p, y: jax.nn.relu(y) @ p)(p["v"], product(x, p["w"]))

    return Case(params, fn, (draw(2, 6, 4),), ("{w,v}",))


def convolution() -> Case:
    params = {"w": draw(0, 3, 2, 4)}

    def fn(p, x):
        return jax.lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    return Case(params, fn, (draw(1, 2, 6, 2),), ("w",))


def materialised() -> Case:
    return Case({"w": draw(0, 4, 5)}, lambda p, x: x @ jnp.tanh(p["w"]), (draw(1, 6, 4),), ("w",))


CASES = {f.__name__: f for f in (mlp, tied, experts, equinox, custom_rules, convolution, materialised)}
