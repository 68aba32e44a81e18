"""Decompositions: truncated singular values of one matrix in float64 on the host, exact or by a random projection; and
those of jax, of one matrix of a stack after another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

OVERSAMPLING = 10


def leading(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(u (m, r), s (r,), vt (r, n)): the leading singular triples, in float64.

    Where the wanted values are all within 1e-4 of the largest, by the eigenvectors of the smaller Gram matrix, several
    times faster: its error in s_i, eps s_1^2 / s_i, is then at most 1e-8 s_i.
    """
    m, n = matrix.shape
    if m > n:
        v, s, ut = leading(matrix.T, rank)
        return ut.T, s, v.T
    gram = smaller_gram(matrix)
    if gram is not None:
        values, vectors = np.linalg.eigh(gram)
        values, u = values[::-1][:rank], vectors[:, ::-1][:, :rank]
        if values[-1] > 1e-8 * values[0]:
            s = np.sqrt(values)
            return u, s, (u.T @ matrix) / s[:, None]
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def smaller_gram(matrix: np.ndarray) -> np.ndarray | None:
    """The smaller Gram matrix; None where its entries over- or underflow."""
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    with np.errstate(over="ignore", under="ignore"):
        gram = wide @ wide.T
    return gram if 1e-250 < float(np.trace(gram)) < 1e250 else None


def randomised(matrix: np.ndarray, rank: int, key: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leading singular triples from a random projection, within about 1 % of the best error for spectra that fall.

    Halko, Martinsson & Tropp, arXiv 0909.4061: 10 more columns than the rank, 2 power iterations.
    """
    columns = min(rank + OVERSAMPLING, *matrix.shape)
    return projected(matrix, rank, np.asarray(jax.random.normal(key, (matrix.shape[1], columns)), np.float64))


def projected(matrix: np.ndarray, rank: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`randomised`, of draws (n, columns) from N(0, 1)."""
    q = matrix @ draws
    for _ in range(2):
        q, _ = np.linalg.qr(q)
        q, _ = np.linalg.qr(matrix.T @ q)
        q = matrix @ q
    q, _ = np.linalg.qr(q)
    u, s, vt = np.linalg.svd(q.T @ matrix, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vt[:rank]


def one_by_one(decompose: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of one matrix as a function of a stack (*S, m, n), which takes one after another, under `vmap`, too.

    LAPACK's functions of a stack, in jaxlib 0.10, leave its parts to the threads of the program and wait for them: two
    at once, on two cores, wait forever. Those of one matrix do not.

    Example:
      >>> import jax.numpy as jnp
      >>> one_by_one(jnp.linalg.eigh)(jnp.ones((3, 2, 2)))[0].shape
      (3, 2)
    """
    each = jax.custom_batching.sequential_vmap(lambda matrix: decompose(matrix))

    def run(stacked: Any) -> Any:
        mapped = each
        for _ in range(stacked.ndim - 2):
            mapped = jax.vmap(mapped)
        return mapped(stacked)

    return run
