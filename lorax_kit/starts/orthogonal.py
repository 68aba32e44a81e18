"""Orthogonal: both factors are drawn, and their product is zero (PEFT's "orthogonal"; no paper).

    A0 = (L Q[0::2])^T / 10,   B0 = (M^T Q[1::2])^T / 10... with Q orthogonal, so that A0^T B0 = 0

Symbols: Q (r, r), L (K, r / 2), M (r / 2, N); A0 is `a` (r, K), B0 is `b` (r, N). Neither is zero, so both have a
gradient at the start. What rounding leaves of the product, 1e-9, the method takes off.
"""

from __future__ import annotations

from math import prod

import jax
import numpy as np
from jax import Array

from lorax_kit.core.method import Hints
from lorax_kit.core.site import Site
from lorax_kit.errors import PlanError
from lorax_kit.starts.matrices import by_matrix
from lorax_kit.starts.start import Start

SIZE = 0.1


def orthogonal(site: Site, w: Array, key: Array, hints: Hints) -> Start:
    """Halves of one orthogonal matrix, each mixed by a draw of its own; the rank must be even."""
    if site.rank % 2:
        raise PlanError(f"start 'orthogonal' splits the rank into halves: {site.rank} is odd.\n  give an even rank")
    s, k, n, half = prod(site.stack_shape), prod(site.in_shape), prod(site.out_shape), site.rank // 2
    shapes = ((s, site.rank, site.rank), (s, k, half), (s, half, n))
    draws = [jax.random.normal(jax.random.fold_in(key, i), shape) for i, shape in enumerate(shapes)]

    def halves(square: np.ndarray, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        q, _ = np.linalg.qr(square)
        return SIZE * (left @ q[0::2]).T, SIZE * (right.T @ q[1::2]).T

    return by_matrix(halves, site, *draws)
