"""Updates of more than one product: Hadamard (LoHa), Kronecker (LoKr), shared shards (MiSS)."""

import numpy as np


def loha(w, a1, b1, a2, b2, scale):
    """W' = W + s (A1^T B1) * (A2^T B2), elementwise (FedPara, arXiv 2108.06098, proposition 1).

    Symbols: a1, a2 (r, in), b1, b2 (r, out); the rank of the update is up to r^2.

    PEFT: `hada_w1_b` is a1, `hada_w1_a` is b1 transposed, the same for 2; s = alpha / r rounded to float32, whatever
    the dtype of the leaves.
    """
    return w + scale * (a1.T @ b1) * (a2.T @ b2)


def lokr(w, left, right, scale):
    """W' = W + s kron(C, D) (LyCORIS, arXiv 2309.14859, section 3).

    Symbols: C is `left` (in_1, out_1), D is `right` (in_2, out_2), in = in_1 in_2, out = out_1 out_2. Each may be a
    matrix or a pair (a (r, in_i), b (r, out_i)) whose product a^T b it is.

    PEFT's matrices are the transposes: `lokr_w1` (out_1, in_1) = left.T, `lokr_w1_a` (out_1, r), `lokr_w1_b`
    (r, in_1), and the same for w2; kron(X, Y)^T = kron(X^T, Y^T). s = alpha / r even where nothing is factored,
    which the paper leaves at 1.
    """
    c, d = (x[0].T @ x[1] if isinstance(x, tuple) else x for x in (left, right))
    return w + scale * np.kron(c, d)


def factorized(size, factor=-1):
    """(m, n) with m n = size: how PEFT and LyCORIS split an axis.

    A positive `factor` that divides the size is m itself, even above n. Otherwise m is the largest divisor up to
    sqrt(size) and, where `factor` is positive, up to `factor`.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    m = max(m for m in range(1, size + 1) if size % m == 0 and m * m <= size and (factor < 0 or m <= max(factor, 1)))
    return m, size // m


def lokr_factored(size_in, size_out, rank, *, factor=-1, both=False):
    """(is C factored, is D factored) in PEFT: where r is less than half of the matrix's longer side.

    C is factored with `both` (PEFT's `decompose_both`) only.
    """
    (in_1, in_2), (out_1, out_2) = factorized(size_in, factor), factorized(size_out, factor)
    return both and rank < max(in_1, out_1) / 2, rank < max(in_2, out_2) / 2


def miss(w, b, *, shards="strided"):
    """W' = W + E B: inputs of one shard share a row of B (arXiv 2409.15371, the efficient form).

    Symbols: `b` (r, out) is the paper's D; E (in, r) has one 1 in each row, y = x W + S B, where S (r,) sums the
    inputs of each shard. There is no scale and nothing else is trained.

    Args:
      b: (r, out); or (r, m) with m a divisor of out, repeated along the outputs (PEFT's "mini", mini_r = m).
      shards: the paper's shards are `r` runs of in / r neighbouring inputs, "contiguous". PEFT's shard i is every
        input n with n mod r = i, "strided", for any `in`. They differ by a permutation of the inputs.
    """
    rank, size = len(b), len(w)
    if shards == "contiguous":
        assert size % rank == 0
        shard = np.arange(size) // (size // rank)
    else:
        shard = np.arange(size) % rank
    return w + np.tile(b, (1, w.shape[1] // b.shape[1]))[shard]


def miss_bat(w, blocks):
    """PEFT's MiSS "bat" (Bone, arXiv 2409.15371v1): W' = W + W B + B block by block, in torch's layout (out, in).

    Symbols: `blocks` (out / r, r, r) has one B for each run of r outputs; W there is cut into (r, r) blocks. The
    delta has full rank and depends on W: it has no low-rank form.
    """
    count, r, _ = blocks.shape
    torch_w, out = w.T, np.zeros_like(w.T)
    for i in range(count):
        rows = slice(i * r, (i + 1) * r)
        for j in range(torch_w.shape[1] // r):
            columns = slice(j * r, (j + 1) * r)
            block = torch_w[rows, columns]
            out[rows, columns] = block + block @ blocks[i] + blocks[i]
    return out.T
