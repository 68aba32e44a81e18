"""Truncated decompositions of one matrix W (K, N) ~ L R, each in the norm of its method.

All of them truncate the singular value decomposition of T W, with T made from calibration data, and undo T:

| method   | T                                       | the norm in which L R is closest to W               |
| -------- | --------------------------------------- | --------------------------------------------------- |
| svd      | 1                                       | Frobenius                                           |
| fisher   | diag(sqrt(mean_n mean (dloss/dW_kn)^2)) | rows by their Fisher information (FWSVD)            |
| asvd     | diag(mean |x_k|)^(1/2)                  | inputs with outliers count more (ASVD)              |
| whitened | C^T, C C^T = sum x x^T                  | |X W - X L R|_F, of the outputs, exactly (SVD-LLM)  |

FWSVD: Hsu et al., arXiv 2207.00112. ASVD: Yuan et al., arXiv 2312.05821. SVD-LLM: Wang et al., arXiv 2403.07378.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax import Array

from lorax_kit.arrays.svd import leading, randomised, smaller_gram
from lorax_kit.calibration.calibrate import Stats, check_finite, moments_of
from lorax_kit.compress.arguments import check_word
from lorax_kit.errors import CompressError

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
      path: of the parameter whose data made it.
    """

    cholesky: np.ndarray | None = None
    diagonal: np.ndarray | None = None
    damping: float = 0.0
    path: str = ""

    def apply(self, w: np.ndarray) -> np.ndarray:
        """T W.

        Raises:
          CompressError: the data were of another number of inputs.
        """
        known = self.cholesky if self.diagonal is None else self.diagonal
        if known is not None and len(known) != len(w):
            raise CompressError(
                f"the calibration data of {self.path!r} have {len(known)} inputs, its matrix {w.shape} has {len(w)}.\n"
                "  they are of another model: calibrate this one"
            )
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
    check_word("method", method, METHODS)
    if method == "svd":
        return Transform()
    moments = moments_of(stats, path, method)
    if method == "fisher":
        squares = _matrix_of(moments.fisher, path, method, index)
        if not squares.any():
            raise CompressError(
                f"all gradients of {path!r} in the calibration data are zero: the loss does not depend on it.\n"
                "  leave it out of the plan, or use 'whitened'"
            )
        return Transform(diagonal=_positive(np.sqrt(squares)), path=path)
    if method == "asvd":
        return Transform(diagonal=_positive(np.sqrt(_matrix_of(moments.absolute, path, method, index))), path=path)
    if moments.gram is None:  # a table: how often each row was looked up
        counts = _finite(moments.counts, path, method)
        return Transform(diagonal=_positive(np.sqrt(counts)), path=path)
    gram = _matrix_of(moments.gram, path, method, index)
    size = float(np.trace(gram)) / len(gram)
    if size <= 0:
        raise CompressError(f"all inputs of {path!r} in the calibration data are zero.")
    added = DAMPING
    while True:
        try:
            factor = np.linalg.cholesky(gram + added * size * np.eye(len(gram)))
        except np.linalg.LinAlgError:
            added *= 10
            continue
        return Transform(cholesky=factor, damping=added, path=path)


def damping(stats: Stats) -> dict[str, float]:
    """How much "whitened" adds to the diagonal of each site's sum x x^T, relative to the diagonal's mean.

    1e-6 everywhere, more where rounding left the sum indefinite; 0 for tables. Directions that the inputs never took
    weigh as if they had this share of the mean energy: where fewer inputs were seen than a site has dimensions
    (`Moments.tokens`), that decides what is kept there, and more batches are worth their time.

    Raises:
      CompressError: as `transform`.

    Example:
      >>> from lorax_kit.compress import Moments
      >>> damping({"w": Moments(tokens=1, gram=np.ones((1, 3, 3)))})
      {'w': 1e-06}
    """
    return {
        path: max(
            transform("whitened", stats, path, i).damping
            for i in range(1 if moments.gram is None else len(moments.gram))
        )
        for path, moments in stats.items()
    }


def _matrix_of(x: np.ndarray | None, path: str, method: str, index: int) -> np.ndarray:
    """Of the stacked matrices' moments those of one."""
    moments = _finite(x, path, method)
    if index >= len(moments):
        raise CompressError(
            f"the calibration data of {path!r} are of {len(moments)} stacked matrices, the parameter has more.\n"
            "  they are of another model: calibrate this one"
        )
    return moments[index]


def _finite(x: np.ndarray | None, path: str, method: str) -> np.ndarray:
    if x is None:
        how = "calibrate(..., loss=...)" if method == "fisher" else "a table takes svd, fisher or whitened"
        raise CompressError(f"the calibration data of {path!r} lack what {method!r} needs.\n  {how}")
    check_finite(x, path)
    return np.asarray(x, np.float64)


def _positive(x: np.ndarray) -> np.ndarray:
    """Entries of no weight are given a little, relative to the mean: T must be undone."""
    mean = float(np.mean(x))
    return np.ones_like(x) if mean <= 0 else np.maximum(x, np.sqrt(DAMPING) * mean)


def decompose(w: np.ndarray, t: Transform, rank: int | None = None, key: Array | None = None) -> Spectrum:
    """The leading `rank` (default: all) singular triples of T W, with T undone.

    Args:
      key: find them by a randomised projection, within about 1 % of the best error for spectra that fall; without it
        exactly.
    """
    matrix = t.apply(np.asarray(w, np.float64))
    rank = min(matrix.shape) if rank is None else min(rank, *matrix.shape)
    u, s, vt = leading(matrix, rank) if key is None else randomised(matrix, rank, key)
    return Spectrum(t.undo(u), s, vt)


def singular_values(w: np.ndarray, t: Transform) -> np.ndarray:
    """Of T W, falling. Their squares are within about 1e-13 of the sum of squares: what truncations lose is exact.

    Squares that are smaller than that are noise. By the eigenvalues of the smaller Gram matrix, three to six times
    faster than a singular value decomposition.
    """
    matrix = t.apply(np.asarray(w, np.float64))
    gram = smaller_gram(matrix)
    if gram is None:
        return np.linalg.svd(matrix, compute_uv=False)
    return np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0))
