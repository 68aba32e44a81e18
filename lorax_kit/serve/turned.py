"""Factors that lose least when they are rounded: the same product, its components mixed so that all are as large.

    W = A^T B = (R^T A')^T (R^T B'),   A' = sqrt(S) U^T,   B' = sqrt(S) V^T,   W = U S V^T,   R orthogonal

Rounding to steps of the largest entry costs W about sum_i max_j(x_j^2) y_i^2 for components of sizes x_i, y_i in A and
B: at least sum_i S_i^2 for any scaling of the components, and (sum_i S_i)^2 / r, which is less, where all are as large.
The same holds for the rounding of the activations between the two products. (Rotations against outliers are those of
QuIP, arXiv 2307.13304, and QuaRot, arXiv 2404.00456; here the rotation costs nothing when it runs.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from lorax_kit.core.lowrank import LowRank
from lorax_kit.core.paths import Params


def turned(params: Params) -> Params:
    """The params with the factors of each `LowRank` leaf turned; what they stand for stays as it is, up to rounding.

    Leaves with stacked factors, and with factors in few bits, stay as they are.

    Example:
      >>> import jax.numpy as jnp
      >>> w = LowRank(a=jnp.ones((1, 4)), b=4 * jnp.ones((1, 3)), shape=(4, 3), dtype=jnp.float32)
      >>> found = turned({"w": w})["w"]
      >>> bool(jnp.allclose(found.a.T @ found.b, 4, atol=1e-5))
      True
    """

    def one(x: Any) -> Any:
        if not isinstance(x, LowRank) or x.stack or not all(_floats(y) for y in (x.a, x.b)):
            return x
        a, b = _turned(*(np.asarray(y, np.float64).reshape(len(y), -1) for y in (x.a, x.b)))
        return replace(x, a=a.reshape(x.a.shape).astype(x.a.dtype), b=b.reshape(x.b.shape).astype(x.b.dtype))

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, LowRank))


def _floats(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and not isinstance(x, jax.core.Tracer) and x.dtype.kind == "f"


def _turned(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors (r, K) and (r, N) of the same product, of r components that are as large as each other."""
    rank = len(a)
    (qa, ra), (qb, rb) = np.linalg.qr(a.T), np.linalg.qr(b.T)  # (K, k), (k, r): k = min(K, r)
    u, s, vt = np.linalg.svd(ra @ rb.T, full_matrices=False)  # (k, m), (m,), (m, n)
    left, right = np.zeros((rank, a.shape[1])), np.zeros((rank, b.shape[1]))
    left[: len(s)] = np.sqrt(s)[:, None] * (qa @ u).T
    right[: len(s)] = np.sqrt(s)[:, None] * (qb @ vt.T).T
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(rank, rank)))
    return rotation.T @ left, rotation.T @ right
