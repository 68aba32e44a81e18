"""Where leaves begin, from W or from draws: bounds, PiSSA, OLoRA, orthogonal, LoRA-XS, LoftQ, PEFT's VeRA draws.

A start that is not a zero update comes with the weight that PEFT then subtracts it from, W - s a0^T b0; here the base
stays as it is and the update is s ((a0 + da)^T (b0 + db) - a0^T b0). The product s a0^T b0 is what both share.
Singular vectors have free signs: compare products, or rows up to a sign.
"""

import numpy as np


def kaiming_bound(fan):
    """PEFT's draws are uniform in +-1/sqrt(fan): He's with torch's a = sqrt(5). VeRA's (`vera_draws`) are wider.

    The fan is the second axis of torch's tensor: `in` of lora_A, hada_w1_b and delora_A, r of hada_w1_a, lokr_w2_a
    and hra_u.
    """
    return 1 / np.sqrt(fan)


def gaussian_std(rank):
    """PEFT's init_lora_weights="gaussian": a from N(0, 1 / r^2), so a standard deviation of 1 / r."""
    return 1 / rank


def svd_part(w, rank):
    """(in, out): the best approximation of this rank, the top of the SVD (Eckart and Young)."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def _halves(w, rank, scale=1.0):
    """(a, b) with scale a^T b = svd_part(w, rank), the singular values shared evenly."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    root = np.sqrt(s[:rank] / scale)[:, None]
    return root * u[:, :rank].T, root * vt[:rank]


def pissa(w, rank, scale):
    """(a0, b0): a0 = sqrt(S / s) U^T, b0 = sqrt(S / s) V^T of the top r (PiSSA, arXiv 2404.02948, eqs. 2 and 3).

    Property: s a0^T b0 = svd_part(w, rank); the rows of a0 are orthogonal, as are those of b0, with norms
    sqrt(S / s). The paper has s = 1; PEFT divides by s, so that the product is the same for any alpha.
    """
    return _halves(w, rank, scale)


def olora(w, rank):
    """(a0, b0) = (R[:r], Q[:, :r]^T) of W^T = Q R (OLoRA, arXiv 2406.01775, section 3), W^T (out, in).

    Property: b0 b0^T = I; a0^T b0 equals W in its first r rows (inputs) and is the projection of the others on the
    span of those. PEFT takes s a0^T b0 from the base.
    """
    q, r = np.linalg.qr(w.T)
    return r[:rank], q[:, :rank].T


def orthogonal(basis, left, right):
    """(a0, b0) from an orthogonal `basis` (r, r), `left` (in, r / 2), `right` (r / 2, out): PEFT's "orthogonal".

    a0 = (left Q_even)^T / 10 and b0 = (right^T Q_odd)^T / 10 with every other row of the basis, counted from 0.
    Property: a0^T b0 = 0 though neither is zero, so both have a gradient at the start. No paper; r must be even.
    """
    return (left @ basis[0::2]).T / 10, (right.T @ basis[1::2]).T / 10


def lora_xs_frozen(w, rank):
    """(a, b) of LoRA-XS (arXiv 2405.17604, section 3): a = U_r^T (r, in), b = diag(S_r) V_r^T (r, out), W = U S V^T.

    The paper has W (out, in) and the singular values with the factor on the side of the outputs, as here. The core
    starts at N(0, 1e-5^2), so that W' is nearly W. Property: a^T b = svd_part(w, rank), the rows of a orthonormal.
    """
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return u[:, :rank].T, s[:rank, None] * vt[:rank]


def loftq(w, rank, quantize, rounds):
    """(quantised base, a, b): Q = quantize(W - a^T b), then a^T b = svd_part(W - Q, r) (arXiv 2310.08659, alg. 1).

    Property: after each round |W - Q - a^T b|^2 is the sum of the squared singular values of W - Q from r on, so
    smaller than |W - Q|^2. The product is not scaled, in the paper and in PEFT: a LoRA with s != 1 starts elsewhere.
    """
    a, b = np.zeros((rank, w.shape[0])), np.zeros((rank, w.shape[1]))
    for _ in range(rounds):
        q = quantize(w - a.T @ b)
        a, b = _halves(w - q, rank)
    return q, a, b


def torch_uniform(stream, shape, bound):
    """Bit for bit what `torch.empty(shape).uniform_(-bound, bound, generator=g)` draws on the CPU, float32.

    Args:
      stream: `np.random.RandomState(seed)` for `torch.Generator().manual_seed(seed)`; it moves on like `g`.
    """
    bits = stream.randint(0, 2**32, size=int(np.prod(shape)), dtype=np.uint32) & np.uint32(2**24 - 1)
    low, high = np.float32(-bound), np.float32(bound)
    # One rounding: torch multiplies and adds in one instruction.
    return (bits / 2.0**24 * np.float64(high - low) + np.float64(low)).astype(np.float32).reshape(shape)


def vera_draws(rank, size_in, size_out, seed=0):
    """(a (r, in), b (r, out)) float32 as PEFT draws them from `projection_prng_key`, on a CPU generator.

    He's uniform draw, +-sqrt(6 / fan): A (r, in) first, with fan `in`; then B (out, r), with fan r, transposed here.
    `size_in` and `size_out` are the largest of all targeted modules; a module takes the first columns.
    """
    stream = np.random.RandomState(seed % 2**32)
    bound_a, bound_b = (np.sqrt(3.0) * (np.sqrt(2) / np.sqrt(fan)) for fan in (size_in, rank))  # in PEFT's order
    a = torch_uniform(stream, (rank, size_in), bound_a)
    return a, torch_uniform(stream, (size_out, rank), bound_b).T
