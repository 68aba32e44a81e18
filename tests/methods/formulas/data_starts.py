"""Where leaves begin, from data: EVA (activations), CorDA (their covariance), LoRA-GA (a gradient)."""

import numpy as np


def eva(x, rank, *, center=True, whiten=False):
    """(a0, explained): the top right singular vectors of the activations x (n, in) (EVA, arXiv 2410.07170, alg. 1).

    b0 is zero. `explained` (r,) is the share of each direction in the total variance, which ranks are given by.
    Property: the rows of a0 are orthonormal and no other r directions explain more of x.

    Args:
      center: PEFT's incremental PCA takes the mean of all rows away; the paper's SVD of x itself is False. PEFT
        takes randomised SVDs of batches: it agrees where directions are well separated.
      whiten: PEFT's option, each row divided by the square root of its singular value.
    """
    x = x - x.mean(0) if center else x
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    a = vt[:rank] / np.sqrt(s[:rank, None]) if whiten else vt[:rank]
    return a, s[:rank] ** 2 / (s**2).sum()


def eva_ranks(explained, budget):
    """Rank of each site (arXiv 2410.07170, section 3): the `budget` directions of the largest shares win.

    Args:
      explained: one array of shares a site, at most rho r of each (PEFT rounds it): no site gets more.

    PEFT then keeps s: with `adjust_scaling_factors` alpha is multiplied by new rank / old rank. A site of rank 0 is
    left out.
    """
    pairs = sorted(((share, i) for i, shares in enumerate(explained) for share in shares), reverse=True)
    return [sum(i == site for _, i in pairs[:budget]) for site in range(len(explained))]


def corda(w, covariance, rank, scale, *, mode, damp=0.01):
    """(a0, b0) with s a0^T b0 = C^-1 (part of C W) (CorDA, arXiv 2406.05223, section 3: SVD(W C), W (out, in)).

    Symbols: C (in, in) is `covariance`, X^T X over the samples, plus `damp` times its mean diagonal on the diagonal.
    C W = U S V^T; a0 = sqrt(S / s) U^T C^-1, b0 = sqrt(S / s) V^T over r of the directions.

    Args:
      mode: "ipm" takes the r largest, "kpm" the r smallest: those that matter least to what the data hold.

    Property: over all directions s a0^T b0 = W. The paper has s = 1. PEFT divides each batch of inputs by its
    largest element first, and doubles `damp` while the inverse is inexact.
    """
    c = covariance + damp * np.diag(covariance).mean() * np.eye(len(covariance))
    u, s, vt = np.linalg.svd(c @ w, full_matrices=False)
    chosen = slice(None, rank) if mode == "ipm" else slice(len(s) - rank, None)
    root = np.sqrt(s[chosen] / scale)[:, None]
    return root * (u[:, chosen].T @ np.linalg.inv(c)), root * vt[chosen]


def lora_ga(gradient, rank, scale=1.0, *, direction="ArB2r", size="stable", gamma=16.0, w=None, paper=False):
    """(a0, b0) from G = U S V^T, G (in, out) being the gradient at W (LoRA-GA, arXiv 2407.05000, section 3).

    a0 takes r rows of U^T and b0 r other rows of V^T, of the top 2r. Property (theorem 3.1): with unit rows the
    first step of both (`lora_ga_step`) is the best approximation of G by rank 2r, its top SVD part.

    Args:
      direction: which rows: "ArB2r" a the first r, b the next; "A2rBr" the reverse; "ArBr" a the odd, b the even.
      size: "stable": out^(1/4) / sqrt(gamma); "weight_svd": the largest singular value of `w` over the first
        of those that b took; "gd_scale": 1 / s; "unit": 1.
      paper: both a0 and b0 by the stable factor, unit vectors. PEFT instead multiplies b0 by its singular values
        and, of the factors, only b0 ("gd_scale": both), and takes randomised SVDs.
    """
    u, s, vt = np.linalg.svd(gradient, full_matrices=False)
    rows = {
        "ArB2r": (np.arange(rank), np.arange(rank, 2 * rank)),
        "A2rBr": (np.arange(rank, 2 * rank), np.arange(rank)),
        "ArBr": (np.arange(1, 2 * rank, 2), np.arange(0, 2 * rank, 2)),
    }
    of_a, of_b = rows[direction]
    a, b = u[:, of_a].T, vt[of_b]
    stable = gradient.shape[1] ** 0.25 / np.sqrt(gamma)
    if paper:
        return stable * a, stable * b
    b = s[of_b, None] * b
    if size == "stable":
        return a, stable * b
    if size == "weight_svd":
        return a, np.linalg.svd(w, compute_uv=False)[0] / s[of_b][0] * b
    return (a / scale, b / scale) if size == "gd_scale" else (a, b)


def lora_ga_step(gradient, a, b):
    """(in, out): what one small step down both gradients moves a^T b by, over -rate s^2: a^T a G + G b^T b."""
    return a.T @ a @ gradient + gradient @ b.T @ b
