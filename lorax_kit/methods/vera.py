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
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from lorax_kit.core.leaves import site_key
from lorax_kit.core.method import Hints, Method, Update
from lorax_kit.core.plan import Site
from lorax_kit.core.setting import RankSetting, is_number, need, plain

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
        ok = is_number(self.d_initial) and 0 < abs(self.d_initial) < float("inf")
        need(ok, f"d_initial is {self.d_initial!r}; it must be a finite number other than 0.")


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


VERA = Method(
    setting=VeRA,
    leaves=VeRALeaves,
    init=init,
    update=update,
    rows=frozenset({"d", "a", "b"}),
    frozen=frozenset({"a", "b"}),
    outputs=frozenset({"v"}),
    max_rank=lambda site: site.rank,
)
