"""Rows of different length in one array: a million texts of tokens in the memory of their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Ragged(Sequence[np.ndarray]):
    """A sequence of one-dimensional arrays.

    Args:
      flat: their entries, one after the other.
      ends: int64 (n,), where each ends.
    """

    flat: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, parts: Iterable[Iterable[Sequence[int]]], dtype: Any = np.int32) -> Ragged:
        """Gather rows that come in parts, such as the tokens of so many texts at a time.

        Example:
          >>> [row.tolist() for row in Ragged.of([[[1, 2], [3]], [[]]])]
          [[1, 2], [3], []]
        """
        flat, sizes = [], []
        for part in parts:
            rows = [np.asarray(row, dtype) for row in part]
            flat.append(np.concatenate([np.zeros(0, dtype), *rows]))
            sizes.append(np.asarray([len(row) for row in rows], np.int64))
        ends = np.cumsum(np.concatenate([np.zeros(0, np.int64), *sizes]))
        return cls(np.concatenate([np.zeros(0, dtype), *flat]), ends)

    @property
    def lengths(self) -> np.ndarray:
        """Of each row, int64 (n,)."""
        return np.diff(self.ends, prepend=0)

    def take(self, index: np.ndarray) -> Ragged:
        """The rows at some places, in that order."""
        return Ragged.of([[self[int(i)] for i in index]], self.flat.dtype)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return self.take(np.arange(len(self))[i])
        at = i + len(self) if i < 0 else i
        if not 0 <= at < len(self):
            raise IndexError(f"row {i} of {len(self)}.")
        return self.flat[self.ends[at - 1] if at else 0 : self.ends[at]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))
