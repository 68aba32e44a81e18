"""Which kernel runs a use of a site, and what it costs. Estimates steer speed only, never results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Product(NamedTuple):
    """The shape of one use: `stack` independent products (M, K) x (K, N) with rank-r factors."""

    stack: int
    tokens: int
    inputs: int
    outputs: int
    rank: int


def choose(product: Product, trials: int) -> tuple[str, str]:
    """Pick "factored" or "merged", and say why.

    With one trial, merging costs two passes over W (forward, and again backward), while the factored form
    costs passes over the activations (add to y, add to dx) and thin products that run far below peak: merging
    wins where 2 K N <= M (K + N) (measured at 384 and 768 wide on CPU: 0.82x against 0.91x of full
    fine-tuning, 0.77x against 0.79x). With stacked trials merging would form one W per trial, where the factored
    form multiplies all trials by the one shared W in a single product.
    """
    _, m, k, n, _ = product
    if trials > 1:
        return "factored", f"{trials} stacked trials share one base product"
    if 2 * k * n <= m * (k + n):
        return "merged", f"{m} tokens outweigh two passes over {k}x{n}"
    return "factored", f"{m} tokens are few against {k}x{n}"


def together(products: Sequence[Product], trials: int) -> bool:
    """Whether products of one input with several bases run as one wide product.

    Narrow products run below peak, but the bases are copied side by side and the outputs cut apart for it. On CPU a
    384-wide encoder's step gains nothing (0.72x of full fine-tuning, 0.71x apart; 8x128 tokens), so only narrower ones
    are joined, and not for few tokens. Stacked trials are rows of one product already.
    """
    return trials == 1 and products[0].tokens >= 64 and max(p.outputs for p in products) <= 256


def forward_flops(product: Product, how: str) -> int:
    """FLOPs of one forward use (a multiply-add counts as 2)."""
    s, m, k, n, r = product
    base = 2 * m * k * n
    extra = {"factored": 2 * m * r * (k + n), "plain": 2 * m * r * (k + n)}.get(how, 2 * r * k * n)
    return s * (base + extra)


def step_flops(product: Product, how: str) -> tuple[int, int]:
    """FLOPs of forward and backward of one use: (adapted, full fine-tuning).

    Full fine-tuning does three products of the base's size; an adapted one two, plus thin ones.
    """
    s, m, k, n, r = product
    full = 3 * 2 * m * k * n
    thin = 2 * m * r * (k + n)
    if how in ("factored", "plain"):
        ours = 2 * 2 * m * k * n + 3 * thin
    elif how == "merged":
        ours = 2 * 2 * m * k * n + 2 * thin + 2 * 2 * r * k * n
    else:
        ours = full + 3 * 2 * r * k * n
    return s * ours, s * full
