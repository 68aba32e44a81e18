"""LoRA-XS: W' = W + s A0^T R B0, A0 and B0 frozen from the truncated SVD of W, R trained (arXiv 2405.17604, section 3).

Symbols: with W = U S V^T cut to rank r, A0 = (U S)^T is `a0` (r, *stack, *in), B0 = V^T is `b0` (r, *stack, *out); R is
`r` (r, r, *stack), r^2 trained numbers for each matrix; s is `scale`.

R starts at zero, so that the update is exactly zero. The paper draws it from N(0, 1e-5^2), which moves W a little; its
gradient, A0 (dL/dW) B0^T, does not need that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.arrays.svd import leading
from lorax_kit.core.method import Hints, Method, Update
from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import ScaledSetting
from lorax_kit.starts.matrices import by_matrix


@dataclass(frozen=True, kw_only=True)
class LoRAXS(ScaledSetting):
    """Adapt a parameter within the span of its own singular vectors (Bałazy et al., arXiv 2405.17604).

    Args:
      rank: how many singular vectors; at least 1, at most min(in, out) of every site. rank^2 numbers are trained.
      alpha, rslora, dropout, dtype, inputs: as in `LoRA`.

    Example:
      >>> import jax
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRAXS(rank=2)}), params, lambda p, x: x @ p["w"], jnp.ones((5, 4)))
      >>> lk.split(params, plan, jax.random.key(0))[1]["w"].r.shape
      (2, 2)
    """

    kind: ClassVar[str] = "lora_xs"


class LoRAXSLeaves(NamedTuple):
    """The leaves of LoRA-XS.

    Attributes:
      r: (rank, rank, *stack).
      a0: (rank, *stack, *in), frozen.
      b0: (rank, *stack, *out), frozen.
    """

    r: Array
    a0: Array
    b0: Array


def init(site: Site, w: Array, key: Array, hints: Hints) -> LoRAXSLeaves:
    """The leading singular vectors of each stacked matrix; R = 0."""
    dtype, rank = jnp.dtype(site.setting.dtype), site.rank

    def triples(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, s, vt = leading(matrix, rank)
        return s[:, None] * u.T, vt

    a0, b0 = by_matrix(triples, site, site.matrices(w))
    assert a0 is not None
    assert b0 is not None
    return LoRAXSLeaves(
        r=jnp.zeros((rank, rank, *site.stack_shape), dtype),
        a0=a0.astype(dtype),
        b0=b0.astype(dtype),
    )


def update(site: Site, w: Array, leaves: LoRAXSLeaves, scale: Any) -> Update:
    """Rows A0[p] and sum_q R[p, q] B0[q]."""
    rank, b0 = leaves.r.shape[0], leaves.b0
    r = leaves.r.reshape(rank, rank, -1)
    b = jnp.einsum("pqs,qso->pso", r, b0.reshape(rank, r.shape[2], -1), precision=jax.lax.Precision.HIGHEST)
    return Update(leaves.a0, b.reshape(b0.shape))


LORA_XS = Method(
    setting=LoRAXS,
    leaves=LoRAXSLeaves,
    init=init,
    update=update,
    rows=frozenset({"r", "a0", "b0"}),
    frozen=frozenset({"a0", "b0"}),
)
