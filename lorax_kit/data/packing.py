"""Several texts in one row: no place of a batch is spent on padding that another text could fill."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lorax_kit.data.ragged import Ragged


class Piece(NamedTuple):
    """The tokens `start` to `end` of a text."""

    text: int
    start: int
    end: int


def pack(lengths: Sequence[int] | np.ndarray, length: int) -> list[list[Piece]]:
    """Lay texts into rows of up to `length` tokens, the longest first, each in the fullest row that has room for it.

    Longer texts are cut into pieces of whole rows and a rest. Best fit decreasing: at most 11/9 of the fewest rows, and
    two thirds of a row (Johnson, 1973).

    Example:
      >>> [[tuple(piece) for piece in row] for row in pack([3, 5, 1, 2], 4)]
      [[(1, 0, 4)], [(0, 0, 3), (1, 4, 5)], [(3, 0, 2), (2, 0, 1)]]
    """
    pieces = [
        Piece(text, start, min(start + length, int(size)))
        for text, size in enumerate(lengths)
        for start in range(0, int(size), length)
    ]
    rows: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # (tokens that are free, row), ascending
    for piece in sorted(pieces, key=lambda piece: (piece.start - piece.end, piece)):
        size = piece.end - piece.start
        at = bisect.bisect_left(room, (size, 0))
        if at == len(room):
            rows.append([])
            left, row = length, len(rows) - 1
        else:
            left, row = room.pop(at)
        rows[row].append(piece)
        if left > size:
            bisect.insort(room, (left - size, row))
    return rows


def packed(texts: Ragged, rows: Sequence[Sequence[Piece]], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of packed texts.

    Returns:
      (ids, segments, told), int32 (n, length) each. Segments number the texts of a row from 1 and are 0 where padded,
      for a model's `mask`, by which tokens see those of their own segment alone; told is 1 where a token follows
      another of its segment.
    """
    shape = (len(rows), length)
    ids, segments, told = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for i, row in enumerate(rows):
        at = 0
        for number, piece in enumerate(row, 1):
            end = at + piece.end - piece.start
            ids[i, at:end] = texts[piece.text][piece.start : piece.end]
            segments[i, at:end] = number
            told[i, at + 1 : end] = 1
            at = end
    return ids, segments, told
