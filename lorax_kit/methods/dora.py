"""DoRA: W' = m * (W + s A^T B) / |W + s A^T B|, norms over the input axes, detached (arXiv 2402.09353, eq. 11).

Symbols: m is `magnitude` (*stack, *out), A is `a` (r, *stack, *in), B is `b` (r, *stack, *out), s is `scale`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.core.method import Hints, Method, Update
from lorax_kit.core.setting import ScaledSetting
from lorax_kit.core.site import Site
from lorax_kit.dtypes import wide
from lorax_kit.methods.lora import factors_of, first_factors, rows_of
from lorax_kit.methods.peft_lora import form
from lorax_kit.starts import start_of

if TYPE_CHECKING:
    from jaxtyping import Float


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
    """|W + s A^T B| per output, shape (*stack, *out), without forming the sum.

    |W + sAB|^2 = |W|^2 + 2s <B, AW> + s^2 <B, (A A^T) B>: r x out products only. At B = 0 it is |W| to the bit,
    which is what `init` stores, so the multiplier starts at exactly 1.
    """
    with jax.default_matmul_precision("highest"):
        dtype = wide(a.dtype, w.dtype)
        w3 = site.matrices(w).astype(dtype)
        a3 = a.astype(dtype).reshape(a.shape[0], w3.shape[0], w3.shape[1])
        b3 = b.astype(dtype).reshape(b.shape[0], w3.shape[0], w3.shape[2])
        scale = jnp.asarray(scale, dtype)
        # XLA's CPU backend copies W for a product with a batch axis, even of size 1: 65 MB for a table of 32,000 rows.
        down = (a3[:, 0] @ w3[0])[:, None] if len(w3) == 1 else jnp.einsum("rsi,sio->rso", a3, w3)
        cross = jnp.sum(b3 * down, axis=0)
        gram = jnp.einsum("rsi,qsi->srq", a3, a3)
        square = jnp.sum(w3 * w3, axis=1) + 2 * scale * cross + scale**2 * jnp.einsum("rso,srq,qso->so", b3, gram, b3)
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(dtype).tiny)).reshape(*site.stack_shape, *site.out_shape)


def init(site: Site, w: Array, key: Array, hints: Hints) -> DoRALeaves:
    """LoRA's factors, and the norms of W as magnitudes."""
    factors = first_factors(site, w, key, hints)
    magnitude = norm(site, w, *rows_of(factors), site.scale)
    return DoRALeaves(factors.a, factors.b, magnitude, factors.a0, factors.b0)


def update(site: Site, w: Array, leaves: DoRALeaves, scale: Any) -> Update:
    """The gain is m / |W + s A^T B|, the norm detached from the gradient (section 4.3 of the paper)."""
    a, b = rows_of(leaves)
    size = norm(site, w, a, b, scale)
    return Update(a, b, out_gain=leaves.magnitude.astype(size.dtype) / jax.lax.stop_gradient(size))


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
