"""Methods that multiply W: Householder reflections (HRA) and gains (IA3)."""

import numpy as np


def hra(w, u, *, gram_schmidt=False):
    """W' = H_r ... H_1 W with H_i = I - 2 u_i u_i^T / |u_i|^2 (arXiv 2405.17484: W H_1 ... H_r, W (out, in)).

    Symbols: `u` (r, in), one vector a row; PEFT's `hra_u` (in, r) is u.T. A zero row is taken as no reflection;
    PEFT divides by its norm and gives NaN.

    Args:
      gram_schmidt: the vectors are orthogonalised first, in their order, and H = I - 2 sum_i q_i q_i^T (the paper's
        limit of a strong penalty). PEFT's `apply_GS` does the same, but its default start has equal pairs of
        vectors, of which nothing is left to orthogonalise: there its H is rounding noise, far from I.
    """
    out, kept = w, []
    for row in u:
        v = row
        if gram_schmidt:
            for other in kept:
                v = v - (other @ v) * other
        length = np.sqrt(v @ v)
        if length > 0:
            kept.append(v / length)
            out = out - 2 * np.outer(kept[-1], kept[-1] @ out)
    return out


def hra_penalty(u):
    """|I - U^T U|_F^2 (arXiv 2405.17484), which keeps the vectors apart. PEFT has no such term."""
    return ((np.eye(len(u)) - u @ u.T) ** 2).sum()


def ia3(w, gain, *, feedforward, bias=None):
    """(W', bias'): a gain on the inputs of a feed-forward layer, on the outputs of others (arXiv 2205.05638, 3.3).

    Symbols: the paper's l is `gain`, (in,) with `feedforward`, else (out,). The paper scales activations, l * (x W),
    of layers without bias. PEFT scales the layer's whole output, so a gain on the outputs scales the bias too; a gain
    on the inputs leaves it. `ia3_l` is (1, in) or (out, 1).
    """
    if feedforward:
        return gain[:, None] * w, bias
    return w * gain, None if bias is None else bias * gain
