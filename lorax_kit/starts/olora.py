"""OLoRA: the factors begin at the first rows of a QR decomposition (Büyükakyüz, arXiv 2406.01775, section 3).

    W^T = Q R,   A0 = R[:r],   B0 = Q[:, :r]^T

Symbols: W is `w` (K, N), the transpose of the paper's; A0 is `a` (r, K), B0 is `b` (r, N), whose rows are orthonormal.
The product A0^T B0 is W in its first r inputs, and the projection of the others on the span of those.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from jax import Array

from lorax_kit.core.method import Hints
from lorax_kit.core.site import Site
from lorax_kit.starts.matrices import by_matrix, signs
from lorax_kit.starts.start import Start


def first_rows(w: np.ndarray, *, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(R[:r], Q[:, :r]^T) of w^T = Q R."""
    q, r = np.linalg.qr(w.T)
    a, b = r[:rank], q[:, :rank].T
    sign = signs(b)
    return sign * a, sign * b


def olora(site: Site, w: Array, key: Array, hints: Hints) -> Start:
    """`a` = R[:r] and `b` = Q[:, :r]^T of W^T = Q R."""
    return by_matrix(partial(first_rows, rank=site.rank), site, site.matrices(w))
