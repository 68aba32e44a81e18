"""Methods whose update is one product of two low-rank matrices: LoRA, DoRA, VeRA, LoRA-XS, DeLoRA."""

import numpy as np


def lora_scale(rank, alpha, *, rslora=False):
    """s = alpha / r (LoRA, arXiv 2106.09685, section 4.1) or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732, thm. 3.2)."""
    return alpha / np.sqrt(rank) if rslora else alpha / rank


def lora(w, a, b, scale):
    """W' = W + s A^T B (arXiv 2106.09685, eq. 3: W0 + BA).

    Symbols: the paper's A is `a` (r, in), its B is `b` transposed, (r, out) here. LoRA-FA (arXiv 2308.03303) is the
    same formula with `a` frozen, LoRA+ (arXiv 2402.12354) with a larger rate for `b`.

    PEFT: `lora_A.weight` is `a`, `lora_B.weight` is `b.T`.
    """
    return w + scale * (a.T @ b)


def lora_bias(bias, b_bias, scale):
    """The bias of a layer under PEFT's `lora_bias`: bias + s b_bias, both (out,). No paper has it."""
    return bias + scale * b_bias


def dora(w, a, b, magnitude, scale):
    """W' = m (W + s A^T B) / |W + s A^T B| (arXiv 2402.09353, eq. 5), norms over the inputs of each output.

    Symbols: m is `magnitude` (out,). At the start m is |W| per output, so W' = W.

    PEFT agrees, and leaves the layer's bias alone; in the backward pass the norm is a constant (section 4.3). Of a
    convolution the norm goes over input channels and window; of an embedding over the vocabulary.
    """
    moved = lora(w, a, b, scale)
    return magnitude * moved / np.sqrt((moved**2).sum(0))


def vera(w, a, b, d, v):
    """W' = W + A^T diag(d) B diag(v) (arXiv 2310.11454, eq. 2: W0 + Lambda_b B Lambda_d A).

    Symbols: A is `a` (r, in) and B is `b` (r, out), frozen draws that all sites share; Lambda_d is `d` (r,),
    Lambda_b is `v` (out,). There is no alpha and no scale.

    PEFT draws one A of the largest `in` and one B of the largest `out` among its targets and gives each site their
    first columns and rows; `vera_lambda_d` is `d`, `vera_lambda_b` is `v`, `vera_B` (out, r) is `b.T`.
    """
    return w + a.T @ np.diag(d) @ b @ np.diag(v)


def lora_xs(w, a, b, core, scale):
    """W' = W + s A^T R B (arXiv 2405.17604, section 3), A and B frozen, from the SVD of W (`lora_xs_frozen`).

    Symbols: R is `core` (r, r), its first axis on the side of the inputs: the transpose of the paper's R, which
    multiplies U_r Sigma_r R V_r^T from the side of the outputs. PEFT has no LoRA-XS.
    """
    return w + scale * (a.T @ core @ b)


def delora(w, a, b, strength, *, norm="inputs", floor=1e-4):
    """W' = W + (lambda / r) sum_i |W| a_i b_i / (|a_i| |b_i|) (arXiv 2503.18225, section 3).

    Symbols: lambda is `strength`, a scalar that is trained; |a_i| and |b_i| are norms of the rows of `a` (r, in)
    and `b` (r, out). There is no alpha.

    Args:
      norm: the paper writes |W| as one Frobenius norm, "whole". PEFT (and the authors' code) takes the norm over the
        outputs of each input, (in,), once, from the weight that the adapter was made for: "inputs".
      floor: PEFT's least row norm, so that a zero row gives a zero update; 0 for the paper.
    """
    size = np.sqrt((w**2).sum(1)) if norm == "inputs" else np.full(len(w), np.sqrt((w**2).sum()))
    total = np.zeros_like(w)
    for row, column in zip(a, b, strict=True):
        lengths = max(np.sqrt(row @ row), floor) * max(np.sqrt(column @ column), floor)
        total += np.outer(row, column) / lengths
    return w + strength / len(a) * size[:, None] * total
