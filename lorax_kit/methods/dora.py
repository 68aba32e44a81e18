"""DoRA: W' = m * (W + s A^T B) / |W + s A^T B|, norms over the input axes, detached (arXiv 2402.09353, eq. 11).

Symbols: m is `magnitude` (*stack, *out), A is `a` (r, *stack, *in), B is `b` (r, *stack, *out), s is `scale`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.arrays.dtypes import wide
from lorax_kit.core.method import Hints, Method, Update
from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import ScaledSetting
from lorax_kit.methods.lora import factors_of, first_factors, rows_of
from lorax_kit.methods.peft_lora import form
from lorax_kit.starts import start_of

if TYPE_CHECKING:
    from jaxtyping import Float

BLOCK, TABLE = 2**20, 2**15
"""Entries of W + s A^T B that are formed at a time; of a table, of which a program may read a few rows, fewer."""


@dataclass(frozen=True, kw_only=True)
class DoRA(ScaledSetting):
    """Adapt directions by a low-rank update and magnitudes by themselves (Liu et al., arXiv 2402.09353).

    Args:
      rank, alpha, rslora, dropout, dtype, inputs: as in `LoRA`. Magnitudes are kept in at least float32.
      start: where the factors begin, as in `LoRA`.
    """

    start: str = "kaiming"
    kind: ClassVar[str] = "dora"

    def __post_init__(self, *_: Any) -> None:
        super().__post_init__()
        object.__setattr__(self, "start", start_of(self.start))


class DoRALeaves(NamedTuple):
    """The leaves of DoRA: LoRA's, and a magnitude for each output.

    Attributes:
      a: (rank, *stack, *in).
      b: (rank, *stack, *out).
      magnitude: (*stack, *out), at least fp32.
      a0, b0: as in LoRA's `Factors`.
    """

    a: Array
    b: Array
    magnitude: Array
    a0: Array | None = None
    b0: Array | None = None


def norm(site: Site, w: Array, a: Array, b: Array, scale: Any) -> Float[Array, ...]:
    """|W + s A^T B| per output, shape (*stack, *out), formed for some inputs at a time.

    The squares of the sum, and not |W|^2 + 2s <B, AW> + s^2 <B, (A A^T) B>, whose digits cancel where an update takes
    most of a column away.
    """
    size: Array = _norm(site.unnamed(), w, a, b, scale)
    return size


@partial(jax.jit, static_argnums=0)
def _norm(site: Site, w: Array, a: Array, b: Array, scale: Any) -> Array:
    """`norm`, one program for all sites alike."""
    dtype = wide(a.dtype, w.dtype)
    w3 = site.matrices(w).astype(dtype)
    stack, ins, outs = w3.shape
    a3 = jnp.asarray(scale, dtype) * a.astype(dtype).reshape(a.shape[0], stack, ins)
    b3 = b.astype(dtype).reshape(b.shape[0], stack, outs)

    def squares(w: Array, a: Array, b: Array) -> Array:
        """(k, N), (r, k), (r, N) -> (N,)."""
        return jnp.sum(jnp.square(w + jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST)), axis=0)

    def matrix(w: Array, a: Array, b: Array) -> Array:
        """One of the stacked matrices."""
        many = max(1, (TABLE if site.lookup else BLOCK) // outs)
        if ins <= many:
            return squares(w, a, b)

        def add(i: Array, total: Array) -> Array:
            rows = (jax.lax.dynamic_slice_in_dim(x, i * many, many, axis) for x, axis in ((w, 0), (a, 1)))
            return total + squares(next(rows), next(rows), b)

        first = jax.lax.fori_loop(0, ins // many, add, jnp.zeros((outs,), dtype))
        return first + squares(w[ins - ins % many :], a[:, ins - ins % many :], b)

    if stack == 1:
        square = matrix(w3[0], a3[:, 0], b3[:, 0])
    else:
        square = jax.lax.map(lambda one: matrix(*one), (w3, jnp.moveaxis(a3, 1, 0), jnp.moveaxis(b3, 1, 0)))
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(dtype).tiny)).reshape(*site.stack_shape, *site.out_shape)


def init(site: Site, w: Array, key: Array, hints: Hints) -> DoRALeaves:
    """LoRA's factors, and the norms of W as magnitudes."""
    factors = first_factors(site, w, key, hints)
    magnitude = norm(site, w, *rows_of(factors), site.scale)
    return DoRALeaves(factors.a, factors.b, magnitude, factors.a0, factors.b0)


def update(site: Site, w: Array, leaves: DoRALeaves, scale: Any) -> Update:
    """The gain is m / |W + s A^T B|, the norm detached from the gradient (section 4.3 of the paper)."""
    a, b = rows_of(leaves)
    size = norm(site, *jax.lax.stop_gradient((w, a, b, scale)))
    magnitude = leaves.magnitude.astype(size.dtype)
    # Programs sum the squares in orders of their own: a norm that is the magnitude but for that is taken to be it, so
    # that the start changes nothing, to the bit.
    rounding = (8 + prod(site.in_shape) ** 0.5) * jnp.finfo(size.dtype).eps
    near = jnp.abs(size - magnitude) <= rounding * size
    return Update(a, b, out_gain=magnitude / jax.lax.stop_gradient(jnp.where(near, magnitude, size)))


DORA = Method(
    setting=DoRA,
    leaves=DoRALeaves,
    init=init,
    update=update,
    rows=frozenset({"a", "b", "a0", "b0"}),
    frozen=frozenset({"a0", "b0"}),
    gains=frozenset({"magnitude"}),
    factors=factors_of,
    peft=form(dora=True),
)
