"""Truncated decompositions of one matrix W (K, N) ~ L R, each in the norm of its method.

All of them truncate the singular value decomposition of T W, with T made from calibration data, and undo T:

| method   | T                                      | the norm in which L R is closest to W               |
| -------- | -------------------------------------- | --------------------------------------------------- |
| svd      | 1                                      | Frobenius                                           |
| fisher   | diag(sqrt(sum_n mean (dloss/dW_kn)^2)) | rows by their Fisher information (FWSVD)            |
| asvd     | diag(mean |x_k|)^(1/2)                 | inputs with outliers count more (ASVD)              |
| whitened | C^T, C C^T = sum x x^T                 | |X W - X L R|_F, of the outputs, exactly (SVD-LLM)  |

FWSVD: Hsu et al., arXiv 2207.00112. ASVD: Yuan et al., arXiv 2312.05821. SVD-LLM: Wang et al., arXiv 2403.07378.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from lorax_kit.compress.calibrate import Stats, moments_of
from lorax_kit.core.errors import CompressError

METHODS = ("svd", "fisher", "asvd", "whitened")
DAMPING = 1e-6
"""Of the mean of the diagonal: what sums in fp32 are worth."""


class Spectrum(NamedTuple):
    """A decomposed matrix, ready to be truncated: W ~ left[:, :r] diag(s[:r]) right[:r].

    Attributes:
      left: (K, R), T undone; columns by falling `s`.
      s: (R,) singular values of T W: truncating at r leaves an error of sum(s[r:]^2) in the norm of the method.
      right: (R, N), orthonormal rows.
    """

    left: np.ndarray
    s: np.ndarray
    right: np.ndarray

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """(a (r, K), b (r, N)), the singular values shared evenly."""
        root = np.sqrt(self.s[:rank])
        return (self.left[:, :rank] * root).T, root[:, None] * self.right[:rank]


class Transform(NamedTuple):
    """T, and how to undo it.

    Attributes:
      cholesky: (K, K) lower, T = C^T; None where T is diagonal.
      diagonal: (K,); None where T is not, or is the identity.
      damping: what was added to the diagonal of sum x x^T, relative to its mean.
    """

    cholesky: np.ndarray | None = None
    diagonal: np.ndarray | None = None
    damping: float = 0.0

    def apply(self, w: np.ndarray) -> np.ndarray:
        """T W."""
        if self.cholesky is not None:
            return self.cholesky.T @ w
        return w if self.diagonal is None else self.diagonal[:, None] * w

    def undo(self, left: np.ndarray) -> np.ndarray:
        """T^-1 L."""
        if self.cholesky is not None:
            return np.linalg.solve(self.cholesky.T, left)
        return left if self.diagonal is None else left / self.diagonal[:, None]


def transform(method: str, stats: Stats | None, path: str, index: int = 0) -> Transform:
    """T of a method.

    Args:
      stats: of the site among others; "svd" needs none.
      index: which of the site's stacked matrices.

    Raises:
      CompressError: an unknown method, moments that are missing, that lack what the method needs, or are not finite.
    """
    if method not in METHODS:
        raise CompressError(f"method {method!r} is unknown; choose from {', '.join(METHODS)}.")
    if method == "svd":
        return Transform()
    moments = moments_of(stats, path, method)
    if method == "fisher":
        return Transform(diagonal=_positive(np.sqrt(_finite(moments.fisher, path, method)[index])))
    if method == "asvd":
        return Transform(diagonal=_positive(np.sqrt(_finite(moments.absolute, path, method)[index])))
    if moments.gram is None:  # a table: how often each row was looked up
        counts = _finite(moments.counts, path, method)
        return Transform(diagonal=_positive(np.sqrt(counts)))
    gram = _finite(moments.gram, path, method)[index]
    size = float(np.trace(gram)) / len(gram)
    if size <= 0:
        raise CompressError(f"all inputs of {path!r} in the calibration data are zero.")
    damping = DAMPING
    while True:
        try:
            found = np.linalg.cholesky(gram + damping * size * np.eye(len(gram)))
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        return Transform(cholesky=found, damping=damping)


def _finite(x: np.ndarray | None, path: str, method: str) -> np.ndarray:
    if x is None:
        how = "calibrate(..., loss=...)" if method == "fisher" else "a table takes svd, fisher or whitened"
        raise CompressError(f"the calibration data of {path!r} lack what {method!r} needs.\n  {how}")
    if not np.isfinite(x).all():
        raise CompressError(
            f"the calibration data of {path!r} are not finite: an input was NaN or infinite, or sums overflowed.\n"
            "  check the params and the batches"
        )
    return np.asarray(x, np.float64)


def _positive(x: np.ndarray) -> np.ndarray:
    """Entries of no weight are given a little, relative to the mean: T must be undone."""
    mean = float(np.mean(x))
    return np.ones_like(x) if mean <= 0 else np.maximum(x, np.sqrt(DAMPING) * mean)


def decompose(w: np.ndarray, t: Transform, rank: int | None = None, key: Array | None = None) -> Spectrum:
    """The leading `rank` (default: all) singular triples of T W, with T undone.

    Args:
      key: find them by a randomised projection (Halko, Martinsson & Tropp, arXiv 0909.4061: 10 more columns, 2 power
        iterations), within about 1 % of the best error for spectra that fall; without it exactly.
    """
    matrix = t.apply(np.asarray(w, np.float64))
    rank = min(matrix.shape) if rank is None else min(rank, *matrix.shape)
    u, s, vt = leading(matrix, rank) if key is None else randomised(matrix, rank, key)
    return Spectrum(t.undo(u), s, vt)


def leading(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(u (m, r), s (r,), vt (r, n)): the leading singular triples, in float64.

    Where the wanted values are all within 1e-4 of the largest, by the eigenvectors of the smaller Gram matrix, several
    times faster: its error in s_i, eps s_1^2 / s_i, is then at most 1e-8 s_i.
    """
    m, n = matrix.shape
    if m > n:
        v, s, ut = leading(matrix.T, rank)
        return ut.T, s, v.T
    values, vectors = np.linalg.eigh(matrix @ matrix.T)
    values, u = values[::-1][:rank], vectors[:, ::-1][:, :rank]
    if values[-1] < 1e-8 * values[0] or values[0] <= 0:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    s = np.sqrt(values)
    return u, s, (u.T @ matrix) / s[:, None]


def singular_values(w: np.ndarray, t: Transform) -> np.ndarray:
    """Of T W, falling."""
    return np.linalg.svd(t.apply(np.asarray(w, np.float64)), compute_uv=False)


def randomised(matrix: np.ndarray, rank: int, key: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leading singular triples from a random projection."""
    columns = min(rank + 10, *matrix.shape)
    q = matrix @ np.asarray(jax.random.normal(key, (matrix.shape[1], columns)), np.float64)
    for _ in range(2):
        q, _ = np.linalg.qr(q)
        q, _ = np.linalg.qr(matrix.T @ q)
        q = matrix @ q
    q, _ = np.linalg.qr(q)
    u, s, vt = np.linalg.svd(q.T @ matrix, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vt[:rank]
