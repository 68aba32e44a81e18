"""The paired test of two conditions and the correction for several.

The test is the exact sign-flip test: under the null hypothesis each of the n paired differences could as well have
had the opposite sign, so the p-value is a share of the 2^n sign patterns and its smallest value is 2^(1-n).
Five seeds therefore end at p = 0.0625; p < .05 needs at least six, and more once p-values are corrected.

Sources: Fisher 1935 (sign flips), Holm 1979.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from lorax_kit.analysis.statistics.intervals import sample

if TYPE_CHECKING:
    from jaxtyping import Float

EXACT_PAIRS = 16  # 2^15 sign patterns up to a common sign; longer samples draw DRAWN of them
DRAWN = 99_999


def sign_flips(differences: Float[np.ndarray, "*batch n"]) -> Float[np.ndarray, "*batch"]:
    """Two-sided sign-flip p-values of many samples of paired differences at once; see `paired_test`.

    Args:
      differences: (*batch, n), finite. Up to 16 pairs it takes memory for *batch * 2^(n-1) numbers.

    Example:
      >>> sign_flips(np.array([[1.0, 2.0, 3.0], [1.0, -2.0, 1.0]])).tolist()
      [0.25, 1.0]
    """
    d = np.asarray(differences, dtype=np.float64)
    n = d.shape[-1]
    if n <= EXACT_PAIRS:  # a pattern and its opposite give the same |sum|: the first sign is fixed
        signs = 1.0 - 2.0 * (np.arange(2 ** (n - 1))[:, None] >> np.arange(n) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(DRAWN, n))
    reached = np.abs(d.sum(axis=-1)) - 1e-12 * np.abs(d).sum(axis=-1)  # ties count, whatever the order of the sum
    count = np.count_nonzero(np.abs(d @ signs.T) >= reached[..., None], axis=-1)
    return count / len(signs) if n <= EXACT_PAIRS else (count + 1) / (DRAWN + 1)


def paired_test(x: ArrayLike, y: ArrayLike) -> float:
    """Two-sided sign-flip test of mean(x - y) = 0; exact up to 16 pairs.

    The smallest p-value n pairs can give is 2^(1-n), so **p < .05 needs at least 6 pairs**, whatever
    the size of the effect (`smallest_p`). Beyond 16 pairs 99,999 sign patterns are drawn with a fixed
    generator.

    Args:
      x: (n,), one value per seed.
      y: (n,), the other condition's value for the same seeds, in the same order.

    Returns:
      The p-value, in (0, 1]; 1.0 for a single pair.

    Raises:
      ValueError: Different lengths, no pairs, or non-finite values.

    Example:
      >>> paired_test([2, 3, 4, 5, 6, 7], [1, 1, 1, 1, 1, 1])  # all six differ in the same direction
      0.03125

    Source: Fisher, "The Design of Experiments", 1935, section 21.
    """
    first, second = sample(x), sample(y)
    if first.size != second.size:
        raise ValueError(f"a paired test needs equal lengths, got {first.size} and {second.size}.")
    return float(sign_flips(first - second))


def smallest_p(pairs: int) -> float:
    """The smallest p-value the sign-flip test can give: 2^(1-pairs).

    Example:
      >>> smallest_p(5), smallest_p(6)
      (0.0625, 0.03125)
    """
    return min(1.0, 2.0 ** (1 - pairs))


def seeds_needed(comparisons: int = 1, level: float = 0.05) -> int:
    """Seeds below which Holm's correction over `comparisons` tests cannot give p < `level`.

    Example:
      >>> seeds_needed(1), seeds_needed(5)
      (6, 8)
    """
    pairs = 1
    while max(1, comparisons) * smallest_p(pairs) >= level:
        pairs += 1
    return pairs


def holm(pvalues: ArrayLike) -> Float[np.ndarray, " m"]:
    """Holm's step-down adjusted p-values, in the order given.

    Sorted ascending, p_(i) becomes max over j <= i of min(1, (m - j + 1) p_(j)). A nan (a comparison
    that could not be made) stays nan and does not count in m.

    Args:
      pvalues: (m,), in [0, 1] or nan.

    Raises:
      ValueError: A p-value outside [0, 1].

    Example:
      >>> holm([0.01, 0.04, 0.03]).tolist()
      [0.03, 0.06, 0.06]

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    p = np.asarray(pvalues, dtype=np.float64).reshape(-1)
    known = np.flatnonzero(~np.isnan(p))
    if ((p[known] < 0) | (p[known] > 1)).any():
        raise ValueError(f"p-values lie in [0, 1], got {p.tolist()}.")
    order = known[np.argsort(p[known], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    factors = np.arange(order.size, 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, factors * p[order]))
    return adjusted
