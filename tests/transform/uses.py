"""One function per way in which a parameter can be used: name -> (params, function, inputs, primitive)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from tests.draws import draw


class UseCase(NamedTuple):
    params: dict[str, Any]
    fn: Callable[..., Any]
    inputs: tuple[Any, ...]
    primitive: str
    materialised: tuple[str, ...] = ()
    own_rule: tuple[str, ...] = ()  # enter a function that keeps its derivative rule
    axes: tuple[int, ...] | None = None
    bits: int = 17  # of agreement: fp32 sums in another order


X = draw(100, 5, 6)  # 5 tokens, 6 wide
IDS = jnp.asarray([[0, 3, 6], [3, 3, 1]])
CASES: dict[str, UseCase] = {}


def case(name, params, fn, *inputs, primitive, **others):
    CASES[name] = UseCase(params, fn, inputs, primitive, **others)


W = {"w": draw(0, 6, 4)}

# Products.
case("x @ w", W, lambda p, x: x @ p["w"], X, primitive="dot_general")
case("w.T @ x", W, lambda p, x: p["w"].T @ x.T, X, primitive="dot_general")
case("x @ w.T", {"w": draw(0, 4, 6)}, lambda p, x: x @ p["w"].T, X, primitive="dot_general")
case("vector @ w", W, lambda p, x: x[0] @ p["w"], X, primitive="dot_general")
case("x.T contracted", W, lambda p, x: jnp.einsum("it,io->to", x.T, p["w"]), X, primitive="dot_general")
case(
    "heads in and out",
    {"w": draw(0, 6, 2, 3), "o": draw(1, 2, 3, 6)},
    lambda p, x: jnp.einsum("thd,hdo->to", jnp.einsum("ti,ihd->thd", x, p["w"]), p["o"]),
    X,
    primitive="dot_general",
)
case(
    "experts",
    {"w": draw(0, 3, 6, 4)},
    lambda p, x: jnp.einsum("end,edh->enh", x, p["w"]),
    draw(1, 3, 5, 6),
    primitive="dot_general",
)
case(
    "experts last",
    {"w": draw(0, 6, 4, 3)},
    lambda p, x: jnp.einsum("end,dhe->neh", x, p["w"]),
    draw(1, 3, 5, 6),
    primitive="dot_general",
)
case("tied, both ways", W, lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, X, primitive="dot_general")
case("twice the same", {"w": draw(0, 6, 6)}, lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], X, primitive="dot_general")
case(
    "an axis of size 1",
    {"w": draw(0, 6, 1, 4)},
    lambda p, x: jnp.einsum("ti,ihd->thd", x, p["w"]),
    X,
    primitive="dot_general",
)
case(
    "one-hot lookup",
    {"w": draw(0, 7, 4)},
    lambda p, ids: jax.nn.one_hot(ids, 7) @ p["w"],
    IDS,
    primitive="dot_general",
)
case(
    "batched over an input axis",
    {"w": draw(0, 5, 6, 4)},
    lambda p, x: (jnp.einsum("ti,tio->to", x, p["w"]), jnp.einsum("ti,tio->o", x, p["w"])),
    X,
    primitive="dot_general",
    axes=(1,),
)
case(
    "ragged experts",
    {"w": draw(0, 3, 6, 4)},
    lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes),
    X,
    jnp.asarray([2, 0, 3]),
    primitive="ragged_dot",
)
case(
    "experts by index",
    {"w": draw(0, 3, 6, 4)},
    lambda p, x, which: jnp.einsum("ti,tio->to", x, p["w"][which]),
    X,
    jnp.asarray([2, 0, 0, 1, 2]),
    primitive="gather",
)

# Lookups.
TABLE = {"w": draw(0, 7, 5)}
case("embedding", TABLE, lambda p, ids: p["w"][ids], IDS, primitive="gather")
case("embedding, tied", TABLE, lambda p, ids: p["w"][ids] @ p["w"].T, IDS, primitive="gather")
case(
    "embedding of heads",
    {"w": draw(0, 7, 2, 3)},
    lambda p, ids: jnp.sin(p["w"][ids]),
    IDS,
    primitive="gather",
)
case("take, filled", TABLE, lambda p, i: jnp.take(p["w"], i, axis=0, fill_value=2.0), IDS + 5, primitive="gather")
case("take, clipped", TABLE, lambda p, i: jnp.take(p["w"], i, axis=0, mode="clip"), IDS + 5, primitive="gather")
case("columns", TABLE, lambda p, ids: p["w"].T[:, ids], IDS, primitive="gather")

# Layout.
case("reshape, split", W, lambda p, x: jnp.einsum("ti,ihd->thd", x, p["w"].reshape(6, 2, 2)), X, primitive="reshape")
case("reshape, merged", {"w": draw(0, 6, 2, 2)}, lambda p, x: x @ p["w"].reshape(6, 4), X, primitive="reshape")
case(
    "reshape, inputs split",
    W,
    lambda p, x: jnp.einsum("tab,abo->to", x.reshape(5, 2, 3), p["w"].reshape(2, 3, 4)),
    X,
    primitive="reshape",
)
case("flat", W, lambda p, x: x @ p["w"].reshape(-1).reshape(6, 4), X, primitive="reshape", materialised=("w",))
case("squeeze", {"w": draw(0, 1, 6, 4)}, lambda p, x: x @ jnp.squeeze(p["w"], 0), X, primitive="squeeze")
case(
    "expand",
    W,
    lambda p, x: jnp.einsum("ti,sio->sto", x, p["w"][None]),
    X,
    primitive="broadcast_in_dim",
)
case(
    "broadcast over a batch",
    W,
    lambda p, x: jnp.einsum("bti,bio->bto", x, jnp.broadcast_to(p["w"], (3, 6, 4))),
    draw(1, 3, 5, 6),
    primitive="broadcast_in_dim",
)
case(
    "broadcast, summed over",
    W,
    lambda p, x: jnp.einsum("bti,bio->to", x, jnp.broadcast_to(p["w"], (3, 6, 4))),
    draw(1, 3, 5, 6),
    primitive="broadcast_in_dim",
)
case(
    "fused qkv, sliced",
    {"w": draw(0, 6, 12)},
    lambda p, x: jnp.tanh(x @ p["w"][:, :4]) * (x @ p["w"][:, 4:8]) + x @ p["w"][:, 8:],
    X,
    primitive="slice",
)
case(
    "fused qkv, split",
    {"w": draw(0, 6, 12)},
    lambda p, x: sum(jnp.tanh(x @ w) for w in jnp.split(p["w"], 3, axis=1)),
    X,
    primitive="split",
)
case(
    "unstacked",
    {"w": draw(0, 2, 6, 4)},
    lambda p, x: sum(jnp.tanh(x @ w) for w in jnp.unstack(p["w"])),
    X,
    primitive="unstack",
)
case("tiled", {"w": draw(0, 3, 4)}, lambda p, x: x @ jnp.tile(p["w"], (2, 1)), X, primitive="tile")
case("repeated", {"w": draw(0, 6, 2)}, lambda p, x: x @ jnp.repeat(p["w"], 2, axis=1), X, primitive="reshape")
case("strided slice", {"w": draw(0, 12, 4)}, lambda p, x: x @ p["w"][::2], X, primitive="slice")
case(
    "one layer of a stack",
    {"w": draw(0, 3, 6, 6)},
    lambda p, x: jnp.tanh(x @ p["w"][0]) @ p["w"][2],
    X,
    primitive="slice",
)
case(
    "layers by index",
    {"w": draw(0, 3, 6, 6)},
    lambda p, x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w"][i]), x),
    X,
    primitive="dynamic_slice",
)
case("reversed", W, lambda p, x: x @ p["w"][::-1], X, primitive="rev")
case("padded", W, lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 2))), X, primitive="pad")
case("rolled", W, lambda p, x: x @ jnp.roll(p["w"], 1, axis=0), X, primitive="concatenate")
QKV = {"q": draw(0, 6, 4), "k": draw(1, 6, 2), "v": draw(2, 6, 3)}
case(
    "fused qkv, joined",
    QKV,
    lambda p, x: x @ jnp.concatenate([p["q"], p["k"], p["v"]], 1),
    X,
    primitive="concatenate",
)
case(
    "joined with an array",
    W,
    lambda p, x: x @ jnp.concatenate([jnp.ones((6, 2)), p["w"]], 1),
    X,
    primitive="concatenate",
)
case(
    "inputs joined",
    {"u": draw(0, 2, 4), "v": draw(1, 4, 4)},
    lambda p, x: x @ jnp.concatenate([p["u"], p["v"]]),
    X,
    primitive="concatenate",
)
case(
    "layers stacked, then scanned",
    {"u": draw(0, 6, 6), "v": draw(1, 6, 6)},
    lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, jnp.stack([p["u"], p["v"]]))[0],
    X,
    primitive="stack",
)
case(
    "the sum of two",
    {"u": draw(0, 6, 4), "v": draw(1, 6, 4)},
    lambda p, x: x @ (p["u"] + p["v"]) + jnp.tanh(x @ (p["u"] - p["v"])),
    X,
    primitive="add",
)

# Scaling.
case("times a number", W, lambda p, x: x @ (p["w"] * 0.3), X, primitive="mul")
case("divided by a number", W, lambda p, x: x @ (p["w"] / 3), X, primitive="div")
case("negative", W, lambda p, x: x @ -p["w"], X, primitive="neg")
case("times a traced number", W, lambda p, x: x @ (p["w"] * jnp.sum(x)), X, primitive="mul")
case("outputs scaled", W, lambda p, x: x @ (p["w"] * jnp.arange(1.0, 5.0)[None]), X, primitive="mul")
case("inputs scaled", W, lambda p, x: x @ (jnp.arange(1.0, 7.0)[:, None] * p["w"]), X, primitive="mul")
case("inputs divided", W, lambda p, x: x @ (p["w"] / jnp.arange(1.0, 7.0)[:, None]), X, primitive="div")
case("masked", W, lambda p, x: x @ (p["w"] * jnp.tri(6, 4)), X, primitive="mul", materialised=("w",))
case(
    "cast",
    W,
    lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
    X,
    primitive="convert_element_type",
    bits=6,
)


# Convolutions.
def conv(p, x, **options):
    settings = {"window_strides": (1,), "padding": "SAME", "dimension_numbers": ("NWC", "WIO", "NWC")} | options
    return lax.conv_general_dilated(x, p["w"], **settings)


SEQ, IMG = draw(1, 2, 9, 4), draw(1, 2, 7, 8, 4)
CONV = "conv_general_dilated"
case("conv 1d", {"w": draw(0, 3, 4, 6)}, conv, SEQ, primitive=CONV)
case("conv 1d, strided", {"w": draw(0, 3, 4, 6)}, partial(conv, window_strides=(2,)), SEQ, primitive=CONV)
case(
    "conv 1d, dilated", {"w": draw(0, 3, 4, 6)}, partial(conv, rhs_dilation=(2,), padding="VALID"), SEQ, primitive=CONV
)
case("conv 1d, groups", {"w": draw(0, 3, 2, 6)}, partial(conv, feature_group_count=2), SEQ, primitive=CONV)
case("conv 1d, depthwise", {"w": draw(0, 3, 1, 8)}, partial(conv, feature_group_count=4), SEQ, primitive=CONV)
case(
    "conv 1d, transposed",
    {"w": draw(0, 3, 4, 6)},
    partial(conv, lhs_dilation=(2,), padding=((1, 1),)),
    SEQ,
    primitive=CONV,
)
case(
    "conv 2d, channels first",
    {"w": draw(0, 6, 4, 3, 2)},
    partial(conv, window_strides=(1, 2), dimension_numbers=("NCHW", "OIHW", "NCHW")),
    jnp.moveaxis(IMG, -1, 1),
    primitive=CONV,
)
case(
    "conv 3d",
    {"w": draw(0, 2, 2, 2, 4, 3)},
    partial(conv, window_strides=(1, 1, 1), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")),
    draw(1, 1, 4, 5, 3, 4),
    primitive=CONV,
)
case(
    "conv, batch groups",
    {"w": draw(0, 3, 4, 6)},
    partial(conv, batch_group_count=2),
    SEQ,
    primitive=CONV,
    materialised=("w",),
)

# Control flow.
STACK = {"w": draw(0, 3, 6, 6)}
case(
    "scanned layers",
    STACK,
    lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0],
    X,
    primitive="scan",
)
case(
    "read by every step",
    {"w": draw(0, 6, 6)},
    lambda p, x: lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), jnp.sum(c)), x, None, length=3),
    X,
    primitive="scan",
)
case(
    "carried unchanged",
    {"w": draw(0, 6, 6)},
    lambda p, x: lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (x, p["w"]), None, length=2)[0][0],
    X,
    primitive="scan",
)
case(
    "scanned over its inputs",
    W,
    lambda p, x: (
        lax.scan(lambda c, wx: (c + wx[1][:, None] * wx[0][None], None), jnp.zeros((5, 4)), (p["w"], x.T))[0]
        + x @ p["w"]
    ),
    X,
    primitive="scan",
    materialised=("w",),
)
case(
    "while",
    {"w": draw(0, 6, 6)},
    lambda p, x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x))[1],
    X,
    primitive="while",
)
case(
    "cond",
    {"u": draw(0, 6, 4), "v": draw(1, 6, 4)},
    lambda p, x: lax.cond(x[0, 0] > 0, lambda x: x @ p["u"], lambda x: jnp.tanh(x @ p["v"]), x),
    X,
    primitive="cond",
)
case(
    "switch",
    {"u": draw(0, 6, 4), "v": draw(1, 6, 4)},
    lambda p, x, i: lax.switch(i, [lambda x: x @ p["u"], lambda x: x @ p["v"], lambda x: x[:, :4]], x),
    X,
    jnp.int32(1),
    primitive="cond",
)

# Calls.
case("nested jit", W, lambda p, x: jax.jit(lambda w, x: x @ w)(p["w"], x), X, primitive="jit")
case("remat", W, lambda p, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(p["w"], x), X, primitive="checkpoint")
case(
    "remat with a policy",
    W,
    lambda p, x: jax.checkpoint(
        lambda w, x: jnp.tanh(x @ w), policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    )(p["w"], x),
    X,
    primitive="checkpoint",
)


@jax.custom_jvp
def product(x, w):
    return x @ w


product.defjvp(lambda primals, tangents: (product(*primals), tangents[0] @ primals[1] + primals[0] @ tangents[1]))


@jax.custom_vjp
def reversed_product(x, w):
    return x @ w


reversed_product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
case("custom_jvp", W, lambda p, x: product(x, p["w"]), X, primitive="custom_jvp", own_rule=("w",))
case("custom_vjp", W, lambda p, x: reversed_product(x, p["w"]), X, primitive="custom_vjp", own_rule=("w",))
case("vmap inside", {"w": draw(0, 3, 6, 4)}, lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]), X, primitive="vmap")


def sharded(p, x):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("model",))
    specs = (PartitionSpec(None, "model"), PartitionSpec())
    return jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(None, "model"))(
        p["w"], x
    )


def sharded_inputs(p, x):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("model",))
    specs = (PartitionSpec("model", None), PartitionSpec(None, "model"))
    product = lambda w, x: lax.psum(x @ w, "model")  # noqa: E731
    return jax.shard_map(product, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())(p["w"], x)


def sharded_rows(p, x):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
    specs = (PartitionSpec(), PartitionSpec("data"))
    return jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data"))(p["w"], x)


case("rows over devices", W, sharded_rows, draw(1, 4, 6), primitive="shard_map")
case("outputs over devices", W, sharded, X, primitive="shard_map")
case("inputs over devices", W, sharded_inputs, X, primitive="shard_map")

# What no rule knows.
case("tanh of it", W, lambda p, x: x @ jnp.tanh(p["w"]), X, primitive="tanh", materialised=("w",))
case("returned", W, lambda p, x: (x @ p["w"], p["w"]), X, primitive="output", materialised=("w",))
case("added to the input", {"w": draw(0, 5, 6)}, lambda p, x: x + p["w"], X, primitive="add", materialised=("w",))
