"""LoRA-GA: the first step follows the gradient of full fine-tuning (Wang et al., arXiv 2407.05000, section 3).

    G = U S V^T,   A0 = c U_1..r^T,   B0 = c V_r+1..2r^T,   c = N^(1/4) / sqrt(gamma)

Symbols: G is the gradient of the loss with respect to W (K, N), A0 is `a` (r, K), B0 is `b` (r, N), gamma is `gamma`.
By theorem 3.1 of the paper A0^T A0 G + G B0^T B0, which a small step moves W along, is then c^2 times the best
approximation of G by rank 2r.

PEFT's defaults: the first r directions go to A ("ArB2r"), and c is "stable" with gamma 16. PEFT itself departs from the
paper by multiplying B0 by its singular values, and A0 not by c; here it is the paper's. For another gamma:
`lk.starts.STARTS["my_start"] = functools.partial(lora_ga, gamma=64)`.
"""

from __future__ import annotations

import numpy as np
from jax import Array

from lorax_kit.arrays.svd import leading
from lorax_kit.core.method import Hints
from lorax_kit.core.site import Site
from lorax_kit.starts.matrices import by_matrix, needed, signs
from lorax_kit.starts.start import Start


def lora_ga(site: Site, w: Array, key: Array, hints: Hints, *, gamma: float = 16.0) -> Start:
    """`a` = c U_1..r^T and `b` = c V_r+1..2r^T of the gradient U S V^T; rows of `b` that do not exist are zero."""
    gradient = needed(site, hints, "gradient", "lora_ga")
    rank = site.rank

    def split(g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, _, vt = leading(g, min(2 * rank, *g.shape))
        c = g.shape[1] ** 0.25 / gamma**0.5
        a, b = u[:, :rank].T, np.zeros((rank, g.shape[1]))
        b[: len(vt) - rank] = vt[rank:]
        return c * signs(a) * a, c * signs(b) * b

    return by_matrix(split, site, site.matrices(gradient))
