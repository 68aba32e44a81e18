"""VeRA: W' = W + A^T diag(d) B diag(v), A and B frozen draws that sites share (arXiv 2310.11454, eq. 2).

Symbols: d is `d` (r, *stack), v is `v` (*stack, *out), A is `a` (r, *in), B is `b` (r, *out). d starts at `d_initial`,
v at zero, so that the update is zero. The scale is 1.

A and B do not depend on the path of the site: sites with the same number of inputs have the same A, those with the same
number of outputs the same B, and stacked matrices share both. Of two sites, or two ranks, the smaller one has the first
columns and rows of the larger one's draws, times the ratio of their Kaiming bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.core.leaves import site_key
from lorax_kit.core.method import Hints, Method, Update
from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import RankSetting, is_float32, need, plain, shown
from lorax_kit.errors import AdapterError
from lorax_kit.peft_form import FromPeft, PeftForm, TorchModule

if TYPE_CHECKING:
    from jaxtyping import Float

BLOCK = 128
"""Columns that are drawn from one key."""


@dataclass(frozen=True, kw_only=True)
class VeRA(RankSetting):
    """Adapt a parameter by vectors that scale frozen random matrices (Kopiczko et al., arXiv 2310.11454).

    Args:
      rank: rows of the random matrices. It may exceed min(in, out): a row costs one trained number.
      d_initial: where `d` starts.
      dropout, dtype, inputs: as in `LoRA`.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"q": jnp.ones((4, 3)), "k": jnp.ones((4, 2))}
      >>> plan = lk.resolve(lk.Spec({"*": lk.VeRA(rank=16)}), params)
      >>> base, factors = lk.split(params, plan, jax.random.key(0))
      >>> bool((factors["q"].a == factors["k"].a).all())
      True
    """

    d_initial: float = 0.1
    kind: ClassVar[str] = "vera"

    def __post_init__(self, *_: Any) -> None:
        object.__setattr__(self, "d_initial", plain(self.d_initial))
        super().__post_init__()
        ok = is_float32(self.d_initial) and self.d_initial != 0
        need(ok, f"d_initial is {shown(self.d_initial)}; it must be a number of float32's range, other than 0.")


class VeRALeaves(NamedTuple):
    """The leaves of VeRA.

    Attributes:
      d: (rank, *stack).
      v: (*stack, *out).
      a: (rank, *in), frozen.
      b: (rank, *out), frozen.
    """

    d: Array
    v: Array
    a: Array
    b: Array


@partial(jax.jit, static_argnums=(1, 2))
def draw(key: Array, rows: int, columns: int, bound: float) -> Float[Array, "rows columns"]:
    """U(-bound, bound) in blocks of columns, a key for each row and block: smaller draws are parts of larger ones."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    keys = jax.vmap(fold, (0, None))(fold(key, jnp.arange(rows)), jnp.arange(-(-columns // BLOCK)))
    blocks = jax.vmap(jax.vmap(lambda k: jax.random.uniform(k, (BLOCK,), jnp.float32, -1.0, 1.0)))(keys)
    return bound * blocks.reshape(rows, -1)[:, :columns]


def init(site: Site, w: Array, key: Array, hints: Hints) -> VeRALeaves:
    """PEFT's start: A and B Kaiming uniform, U(-sqrt(6 / n), sqrt(6 / n)), n the numbers that one of x A^T or u B sums.

    A lookup sums one row of A.
    """
    dtype = jnp.dtype(site.setting.dtype)
    ins, outs = prod(site.in_shape), prod(site.out_shape)
    a = draw(site_key(key, "vera a"), site.rank, ins, (6 / (1 if site.lookup else ins)) ** 0.5)
    b = draw(site_key(key, "vera b"), site.rank, outs, (6 / site.rank) ** 0.5)
    return VeRALeaves(
        d=jnp.full((site.rank, *site.stack_shape), site.setting.d_initial, dtype),  # type: ignore[attr-defined]
        v=jnp.zeros((*site.stack_shape, *site.out_shape), dtype),
        a=a.astype(dtype).reshape(site.rank, *site.in_shape),
        b=b.astype(dtype).reshape(site.rank, *site.out_shape),
    )


def update(site: Site, w: Array, leaves: VeRALeaves, scale: Any) -> Update:
    """Rows d[r] A[r] and B[r] v."""
    stack, ins = len(site.stack_shape), len(site.in_shape)
    d = jnp.expand_dims(leaves.d, tuple(range(1 + stack, 1 + stack + ins)))
    a, b = (jnp.expand_dims(x, tuple(range(1, 1 + stack))) for x in (leaves.a, leaves.b))
    return Update(d * a, b * leaves.v[None])


def projections(seed: int, rank: int, ins: int, outs: int) -> dict[str, Any]:
    """PEFT's A (rank, ins) and B (outs, rank), as torch's generator draws them on a CPU.

    24 bits of each word of the Mersenne Twister, Kaiming uniform: U(-b, b), b = sqrt(6 / fan).
    """
    words = np.random.RandomState(seed % 2**32)

    def drawn(shape: tuple[int, int]) -> Any:
        bound = np.sqrt(3.0) * np.sqrt(2.0) / np.sqrt(shape[1])
        low = words.randint(0, 2**32, shape, np.uint32) & np.uint32(2**24 - 1)
        unit = low.astype(np.float64) / 2**24
        return (unit * np.float64(np.float32(2 * bound)) + np.float64(np.float32(-bound))).astype(np.float32)

    return {"vera_A": drawn((rank, ins)), "vera_B": drawn((outs, rank))}


def _shared(config: Any, modules: list[TorchModule], tensors: Any) -> dict[str, Any]:
    """The projections of all modules, stored or drawn again."""
    ins, outs = max(m.size for m in modules), max(m.outputs for m in modules)
    if config["save_projection"]:
        for name, axis, least in (("vera_A", 1, ins), ("vera_B", 0, outs)):
            x = tensors.get(name)
            if x is None or x.ndim != 2 or x.shape[1 - axis] != config["r"] or x.shape[axis] < least:
                have = "is missing" if x is None else f"has shape {x.shape}"
                raise AdapterError(
                    f"VeRA's {name} {have}; rank {config['r']} and the largest module call for {least} or more columns."
                )
        return dict(tensors)
    half = next((m for m in modules if m.dtype != "float32"), None)
    if half is not None:
        raise AdapterError(
            f"VeRA's projections were not saved, and {half.name!r} is {half.dtype}: PEFT rounds its draws to that.\n"
            "  save them in PEFT (save_projection=True), or load over a float32 base"
        )
    seed = config["projection_prng_key"]
    need(type(seed) is int, f"projection_prng_key is {seed!r}; it must be an integer.")
    return dict(tensors) | projections(seed, config["r"], ins, outs)


def _read(m: TorchModule, tensors: Any) -> FromPeft:
    c = m.config
    leaves = {
        "d": tensors["vera_lambda_d"],
        "v": tensors["vera_lambda_b"],
        "a": m.shared["vera_A"][:, : m.size],
        "b": m.shared["vera_B"][: m.outputs].T,
    }
    return FromPeft({"rank": c["r"], "d_initial": c["d_initial"] or 0.1, "dropout": c["vera_dropout"] or 0.0}, leaves)


def _share(modules: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One A and one B for all modules: the largest, of which the others are parts, times a number that d takes on."""
    draws: dict[str, Any] = {}
    for name, leaf, vector in (("vera_A", "a", "vera_lambda_d"), ("vera_B", "b", "vera_lambda_d")):
        whole = max((leaves[leaf] for _, _, leaves, _ in modules.values()), key=lambda x: x.shape[1])
        for module, (_, _, leaves, tensors) in modules.items():
            x = leaves[leaf]
            part = whole[: len(x), : x.shape[1]]
            if np.array_equal(x, part):
                continue
            factor = float((x * part).sum() / (part * part).sum())
            if x.shape != part.shape or not np.allclose(x, factor * part, rtol=1e-5, atol=1e-6):
                raise AdapterError(
                    f"PEFT has one pair of random matrices for all modules, and {module!r} has others.\n"
                    "  split the params by one key, or use lk.save_adapter"
                )
            tensors[vector] = (tensors[vector] * factor).astype(tensors[vector].dtype)
        draws[name] = whole if leaf == "a" else whole.T
    return draws, {"save_projection": True}


VERA = Method(
    setting=VeRA,
    leaves=VeRALeaves,
    init=init,
    update=update,
    rows=frozenset({"d", "a", "b"}),
    frozen=frozenset({"a", "b"}),
    outputs=frozenset({"v"}),
    max_rank=lambda site: site.rank,
    peft=PeftForm(
        peft_type="VERA",
        axes={"d": "r", "v": "o", "a": "RI", "b": "RO"},
        layers=frozenset({"Linear", "Conv1D"}),
        keys={
            **{"r": 256, "projection_prng_key": 0, "save_projection": True},
            **{"vera_dropout": 0.0, "d_initial": 0.1},
        },
        training=frozenset({"init_weights"}),
        bias="vera_only",
        endings=("vera_lambda_d", "vera_lambda_b"),
        shapes=lambda m, tensors: {"vera_lambda_d": (m.config["r"],), "vera_lambda_b": (m.outputs,)},
        read=_read,
        write=lambda m, setting, leaves: {"vera_lambda_d": leaves["d"], "vera_lambda_b": leaves["v"]},
        config=lambda m, setting, leaves: {
            "r": setting.rank,
            "vera_dropout": setting.dropout,
            "d_initial": setting.d_initial,
        },
        shared=_shared,
        share=_share,
    ),
)
