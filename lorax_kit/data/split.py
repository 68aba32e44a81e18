"""Training, validation and test parts of one set of rows: disjoint, stratified, of rows that differ."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from lorax_kit.errors import DataError


class Parts(NamedTuple):
    """Places of the rows of each part, int64, in a shuffled order; and how many were left out, and why.

    Attributes:
      train, val, test: (n,) each.
      equal: rows that stand earlier in the file, too.
      contradictory: rows of one text with different labels, all of which are left out.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    equal: int
    contradictory: int


def key_of(*texts: str) -> int:
    """A signed integer of 64 bits that tells texts apart, up to case and white space."""
    plain = "\0".join(" ".join(text.lower().split()) for text in texts)
    return int.from_bytes(
        hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True
    )


def size_of(share: float | int, rows: int) -> int:
    """How many rows a share of them is (a float below 1), or a number of rows."""
    return round(share * rows) if isinstance(share, float) else share


def split_rows(
    keys: np.ndarray,
    strata: np.ndarray | None = None,
    *,
    val: float | int,
    test: float | int,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> Parts:
    """Shuffle once and split; the same rows, sizes and seed give the same parts on every platform.

    Args:
      keys: (n,), equal where rows are; see `key_of`. Of equal rows the first counts.
      strata: (n,), what shall be as frequent in each part as in the whole, such as labels: equal rows of different
        strata contradict each other. None: nothing.
      val, test: of each part, a share of the rows as a float below 1, or a number of rows.
      groups: (n,), rows of one group stay in one part, such as questions about one text; not with `strata`.

    Raises:
      DataError: nothing left to train on; rows all of which contradict each other.
    """
    kept, equal, contradictory = distinct(keys, strata)
    if contradictory and not len(kept):
        raise DataError(
            f"all {contradictory} rows contradict each other: each has another row's text, and another label."
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    sizes = {"test": size_of(test, len(kept)), "val": size_of(val, len(kept))}
    if min(sizes.values()) < 0 or sum(sizes.values()) >= max(len(kept), 1):
        raise DataError(
            f"{len(kept)} rows that differ are too few for {sizes['val']} of validation and {sizes['test']} of test: "
            "none would be left to train on."
        )
    parts: dict[str, np.ndarray] = {}
    rest = rng.permutation(kept)
    for name, size in sizes.items():
        chosen = _whole_groups(rest, groups, size) if groups is not None else _share_of_each(rest, strata, size)
        parts[name] = rest[chosen]
        rest = rest[~chosen]
    if len(rest) == 0:
        raise DataError("the groups of rows are too few to split: none would be left to train on.")
    return Parts(rest, parts["val"], parts["test"], equal, contradictory)


def distinct(keys: np.ndarray, strata: np.ndarray | None) -> tuple[np.ndarray, int, int]:
    """Places of the rows that count, in order; how many equal others, and how many contradict each other."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    torn = np.zeros(len(first), bool)
    if strata is not None:
        torn[inverse[strata != strata[first][inverse]]] = True
    contradictory = int(torn[inverse].sum())
    kept = np.sort(first[~torn])
    return kept, len(keys) - contradictory - len(kept), contradictory


def disagreeing(keys: np.ndarray, targets: np.ndarray) -> int:
    """How many rows are of an earlier row's key, and have another target than the first of that key.

    Example:
      >>> disagreeing(np.array([7, 7, 7, 8]), np.array([1.0, 1.0, 2.0, 2.0]))
      1
    """
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return int((targets != targets[first][inverse]).sum())


def _share_of_each(rows: np.ndarray, strata: np.ndarray | None, size: int) -> np.ndarray:
    """Mask of the first `size` rows, of each stratum as many as its share says, by largest remainders."""
    of = np.zeros(len(rows), int) if strata is None else np.unique(strata[rows], return_inverse=True)[1]
    counts = np.bincount(of)
    exact = size * counts / len(rows)
    take = np.floor(exact).astype(int)
    for stratum in np.argsort(take - exact, kind="stable")[: size - take.sum()]:
        take[stratum] += 1
    order = np.argsort(of, kind="stable")
    rank = np.empty(len(rows), int)
    rank[order] = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    mask: np.ndarray = rank < take[of]
    return mask


def _whole_groups(rows: np.ndarray, groups: np.ndarray, size: int) -> np.ndarray:
    """Mask of the rows of whole groups, in the rows' order, until there are `size` or more."""
    taken: set[int] = set()
    count = 0
    sizes = dict(zip(*np.unique(groups[rows], return_counts=True), strict=True))
    for group in groups[rows]:
        if count >= size:
            break
        if group not in taken:
            taken.add(group)
            count += int(sizes[group])
    return np.isin(groups[rows], list(taken))
