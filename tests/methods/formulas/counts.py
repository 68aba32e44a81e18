"""How many parameters each method trains at one site, from its shape (in, out) and rank alone."""

from tests.methods.formulas.structured import factorized, lokr_factored


def _lokr(size_in, size_out, rank, *, factor=-1, both=False):
    (in_1, in_2), (out_1, out_2) = factorized(size_in, factor), factorized(size_out, factor)
    left, right = lokr_factored(size_in, size_out, rank, factor=factor, both=both)
    return (rank * (in_1 + out_1) if left else in_1 * out_1) + (rank * (in_2 + out_2) if right else in_2 * out_2)


# Method -> (in, out, rank) -> count, without what is frozen: draws, LoRA-XS's factors, LoRA-FA's a, DeLoRA's norm.
TRAINED = {
    "lora": lambda i, o, r: r * (i + o),
    "lora_fa": lambda i, o, r: r * o,
    "dora": lambda i, o, r: r * (i + o) + o,
    "vera": lambda i, o, r: r + o,
    "lora_xs": lambda i, o, r: r * r,
    "loha": lambda i, o, r: 2 * r * (i + o),
    "lokr": _lokr,
    "miss": lambda i, o, r: r * o,
    "miss_mini": lambda i, o, r, width: r * width,
    "miss_bat": lambda i, o, r: o * r,
    "delora": lambda i, o, r: r * (i + o) + 1,
    "hra": lambda i, o, r: r * i,
    "ia3": lambda i, o, r=0: o,
    "ia3_feedforward": lambda i, o, r=0: i,
    "adalora": lambda i, o, r: r * (i + o + 1),
}
