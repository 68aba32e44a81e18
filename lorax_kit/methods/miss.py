"""MiSS: W' = W + A^T B, A the fixed indicator of r shards of the inputs (Kang & Yin, arXiv 2409.15371).

Symbols: A is `a` (r, *stack, *in), B is `b` (r, *stack, *out); a[i, n] = 1 where n mod r = i, and 0 elsewhere.

Input n, counted over all input axes in their order, belongs to shard n mod r, as in PEFT; the paper's shards are runs
of inputs, the same up to their order. The indicator is of the trial's own rank, so it is a leaf: trials of different
rank stack by zero rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.core.method import Hints, Method, Update
from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import RankSetting, is_int, need
from lorax_kit.peft_form import FromPeft, PeftForm, TorchModule


@dataclass(frozen=True, kw_only=True)
class MiSS(RankSetting):
    """Train one vector of outputs for each shard of the inputs (Kang & Yin, arXiv 2409.15371).

    Args:
      rank: shards; at least 1, at most the inputs of every site. Twice LoRA's rank trains about as many parameters.
      dropout: probability in [0, 1) of dropping inputs of the low-rank path while training.
      dtype, inputs: as in `LoRA`.
    """

    kind: ClassVar[str] = "miss"


class MiSSLeaves(NamedTuple):
    """The leaves of MiSS.

    Attributes:
      a: (rank, *stack, *in), zeros and ones, frozen.
      b: (rank, *stack, *out).
    """

    a: Array
    b: Array


def init(site: Site, w: Array, key: Array, hints: Hints) -> MiSSLeaves:
    """The indicator, and zeros: nothing is drawn."""
    dtype = jnp.dtype(site.setting.dtype)
    shard = jnp.arange(prod(site.in_shape)) % site.rank
    rows = (jnp.arange(site.rank)[:, None] == shard[None]).astype(dtype)
    rows = rows.reshape(site.rank, *(1,) * len(site.stack_shape), *site.in_shape)
    return MiSSLeaves(jnp.broadcast_to(rows, site.a_shape), jnp.zeros(site.b_shape, dtype))


def update(site: Site, w: Array, leaves: MiSSLeaves, scale: Any) -> Update:
    """A and B as they are; `w` plays no part."""
    return Update(leaves.a, leaves.b)


def max_rank(site: Site) -> int:
    """A shard for each input."""
    return prod(site.in_shape)


def _mini(m: TorchModule) -> int:
    """How many numbers a shard has, where its outputs repeat them; else N."""
    start = m.config["init_weights"]
    need(start != "bat", "MiSS with init_weights 'bat' moves the base by its own blocks: no product of factors.")
    mini = m.config["mini_r"] if start == "mini" else m.outputs
    need(is_int(mini) and mini > 0, f"mini_r is {mini!r}; it must be an integer of at least 1.")
    need(m.outputs % mini == 0, f"mini_r {mini} does not divide the {m.outputs} outputs.")
    return mini


def _read(m: TorchModule, tensors: Any) -> FromPeft:
    rank = m.config["r"]
    a = np.arange(rank)[:, None] == np.arange(m.size)[None] % rank
    b = np.tile(tensors["miss_block"], (1, m.outputs // _mini(m)))
    return FromPeft({"rank": rank, "dropout": m.config["miss_dropout"] or 0.0}, {"a": a.astype(np.float32), "b": b})


MISS = Method(
    setting=MiSS,
    leaves=MiSSLeaves,
    init=init,
    update=update,
    rows=frozenset({"a", "b"}),
    frozen=frozenset({"a"}),
    max_rank=max_rank,
    peft=PeftForm(
        peft_type="MISS",
        axes={"a": "ri", "b": "ro"},
        layers=frozenset({"Linear"}),
        keys={"r": 64, "mini_r": 1, "init_weights": True, "miss_dropout": 0.0},
        bias="miss_only",
        endings=("miss_block",),
        shapes=lambda m, tensors: {"miss_block": (m.config["r"], _mini(m))},
        read=_read,
        write=lambda m, setting, leaves: {"miss_block": leaves["b"]},
        config=lambda m, setting, leaves: {"r": setting.rank, "miss_dropout": setting.dropout, "init_weights": True},
    ),
)
