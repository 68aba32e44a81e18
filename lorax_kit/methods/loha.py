"""LoHa: W' = W + s (A1^T B1) * (A2^T B2), entry by entry (Hyeon-Woo et al., arXiv 2108.06098, eq. 3).

Symbols: A1, A2 are `a1`, `a2` (r, *stack, *in), B1, B2 are `b1`, `b2` (r, *stack, *out), s is `scale`.

The product is the sum over pairs (i, j) of (a1_i * a2_j)^T (b1_i * b2_j): r^2 rows, a Khatri-Rao product. Where r^2
exceeds min(in, out), the rows are those of an identity and of the product itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from lorax_kit.core.leaves import site_key
from lorax_kit.core.method import Hints, Method, Update
from lorax_kit.core.plan import Site
from lorax_kit.core.setting import ScaledSetting
from lorax_kit.starts.draws import draw_rows

HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True, kw_only=True)
class LoHa(ScaledSetting):
    """Adapt a parameter by the entrywise product of two low-rank matrices (FedPara, arXiv 2108.06098).

    Args:
      rank: of each of the two; at least 1, at most min(in, out) of every site. Their product has up to rank^2.
      alpha, rslora, dropout, dtype, inputs: as in `LoRA`.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((6, 5))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoHa(rank=2)}), params, lambda p, x: x @ p["w"], jnp.ones((5, 6)))
      >>> [x.shape for x in lk.split(params, plan, jax.random.key(0))[1]["w"]]
      [(2, 6), (2, 5), (2, 6), (2, 5)]
    """

    kind: ClassVar[str] = "loha"


class LoHaLeaves(NamedTuple):
    """The leaves of LoHa.

    Attributes:
      a1, a2: (rank, *stack, *in).
      b1, b2: (rank, *stack, *out).
    """

    a1: Array
    b1: Array
    a2: Array
    b2: Array


def init(site: Site, w: Array, key: Array, hints: Hints) -> LoHaLeaves:
    """PEFT's start: A2 zero, A1 from U(-1, 1) / sqrt(in), B1 and B2 from U(-1, 1) / sqrt(rank)."""
    dtype, own = jnp.dtype(site.setting.dtype), site_key(key, site.path)

    def drawn(name: str, shape: tuple[int, ...], summed: int) -> Array:
        return draw_rows(site_key(own, name), shape, summed**-0.5, uniform=True, dtype=dtype)

    return LoHaLeaves(
        a1=drawn("a1", site.a_shape, 1 if site.lookup else prod(site.in_shape)),
        b1=drawn("b1", site.b_shape, site.rank),
        a2=jnp.zeros(site.a_shape, dtype),
        b2=drawn("b2", site.b_shape, site.rank),
    )


def dense_product(a: Float[Array, " r stack in"], b: Float[Array, " r stack out"]) -> Float[Array, " stack in out"]:
    """a^T b of each stacked matrix."""
    return jnp.einsum("rsi,rso->sio", a, b, precision=HIGHEST)


def identity_rows(dense: Float[Array, " stack in out"]) -> tuple[Array, Array]:
    """a (r, stack, in) and b (r, stack, out) with dense = a^T b, r = min(in, out): an identity on the shorter side.

    Example:
      >>> a, b = identity_rows(jnp.ones((4, 3, 2)))
      >>> a.shape, b.shape
      ((2, 4, 3), (2, 4, 2))
    """
    stack, ins, outs = dense.shape
    n = min(ins, outs)
    eye = jnp.broadcast_to(jnp.eye(n, dtype=dense.dtype)[:, None], (n, stack, n))
    return (eye, jnp.moveaxis(dense, 1, 0)) if ins <= outs else (jnp.moveaxis(dense, 2, 0), eye)


def update(site: Site, w: Array, leaves: LoHaLeaves, scale: Any) -> Update:
    """Rows of pairs; or at most min(in, out) of the dense product."""
    a1, b1, a2, b2 = leaves
    rank, ins, outs = a1.shape[0], prod(site.in_shape), prod(site.out_shape)
    if rank**2 <= min(ins, outs):
        return Update(*((x[:, None] * y[None]).reshape(rank**2, *x.shape[1:]) for x, y in ((a1, a2), (b1, b2))))
    pairs = ((a1, b1), (a2, b2))
    one, two = (dense_product(a.reshape(rank, -1, ins), b.reshape(rank, -1, outs)) for a, b in pairs)
    shapes = ((*site.stack_shape, *site.in_shape), (*site.stack_shape, *site.out_shape))
    return Update(*(x.reshape(x.shape[0], *shape) for x, shape in zip(identity_rows(one * two), shapes, strict=True)))


LOHA = Method(
    setting=LoHa,
    leaves=LoHaLeaves,
    init=init,
    update=update,
    rows=frozenset({"a1", "b1", "a2", "b2"}),
    outputs=frozenset({"b1", "b2"}),
)
