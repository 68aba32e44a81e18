"""CorDA: a decomposition of W that knows which inputs occur (Yang et al., arXiv 2406.05223, section 3).

    C W = U S V^T,   s A0^T B0 = C^-1 U_r S_r V_r^T

Symbols: W is `w` (K, N), the transpose of the paper's; C (K, K) is the mean of x x^T over the inputs, A0 is `a` (r, K),
B0 is `b` (r, N), s is the scale; the paper has s = 1, PEFT divides by s as here. Over all directions A0^T B0 = W / s.

C is divided by its mean diagonal, then 0.01 is added to the diagonal, so that the start does not depend on the unit of
the inputs (PEFT divides each batch by its largest entry) and directions that no input took can be undone.
"""

from __future__ import annotations

import numpy as np
from jax import Array

from lorax_kit.arrays.svd import leading
from lorax_kit.core.method import Hints
from lorax_kit.core.site import Site
from lorax_kit.starts.matrices import balanced, by_matrix, needed
from lorax_kit.starts.start import Start

DAMPING = 0.01


def corda_ipm(site: Site, w: Array, key: Array, hints: Hints) -> Start:
    """Instruction-previewed: the r largest directions, those that matter most to the data given, are trained."""
    return _corda(site, w, hints, "corda_ipm")


def corda_kpm(site: Site, w: Array, key: Array, hints: Hints) -> Start:
    """Knowledge-preserved: the r smallest directions are trained, so that what the data given hold stays frozen."""
    return _corda(site, w, hints, "corda_kpm")


def weighting(gram: np.ndarray) -> np.ndarray:
    """C of a sum of x x^T."""
    size = float(np.trace(gram)) / len(gram)
    return gram / (size if size > 0 else 1.0) + DAMPING * np.eye(len(gram))


def _corda(site: Site, w: Array, hints: Hints, name: str) -> Start:
    gram = needed(site, hints, "gram", name)

    def directions(w: np.ndarray, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        c = weighting(gram)
        if name == "corda_ipm":
            u, s, vt = leading(c @ w, site.rank)
        else:
            u, s, vt = np.linalg.svd(c @ w, full_matrices=False)
            u, s, vt = u[:, -site.rank :], s[-site.rank :], vt[-site.rank :]
        return balanced(np.linalg.solve(c, u), s, vt, site.scale)

    return by_matrix(directions, site, site.matrices(w), gram)
