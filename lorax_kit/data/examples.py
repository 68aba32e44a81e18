"""Encoded rows by field, gathered a part at a time: what a task makes of a file, in the memory of its numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorax_kit.data.ragged import Ragged
from lorax_kit.data.table import Row

AT_ONCE = 1024

Encode = Callable[[Sequence[Row]], Mapping[str, Sequence[Any]]]
"""Rows -> field -> a value for each example: a list of integers, or one number or text. A row is one example, unless
the field "line" says of each where its row begins."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows of a file, encoded.

    Args:
      fields: name -> `Ragged` where a row holds several numbers, or an array (n,).
      lines: (n,), where each row begins in its file.
    """

    fields: Mapping[str, Any]
    lines: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[Row], encode: Encode) -> Examples:
        """Encode rows, so many at a time.

        Example:
          >>> rows = [Row(2, {"text": "a b"}), Row(3, {"text": "c"})]
          >>> examples = Examples.of(rows, lambda some: {"size": [len(row.cells["text"]) for row in some]})
          >>> examples["size"].tolist(), examples.lines.tolist()
          ([3, 1], [2, 3])
        """
        parts: dict[str, list[Any]] = {}
        lines: list[int] = []
        iterator = iter(rows)
        while chunk := list(itertools.islice(iterator, AT_ONCE)):
            encoded = dict(encode(chunk))
            lines += encoded.pop("line", [row.line for row in chunk])
            for name, values in encoded.items():
                parts.setdefault(name, []).append(_array(values))
        return cls({name: _joined(some) for name, some in parts.items()}, np.asarray(lines, np.int64))

    def take(self, index: np.ndarray) -> Examples:
        """The rows at some places, in that order."""
        taken = {name: x.take(index) if isinstance(x, Ragged) else x[index] for name, x in self.fields.items()}
        return Examples(taken, self.lines[index])

    @property
    def firsts(self) -> np.ndarray:
        """The place of each row's first example: those of a row follow each other."""
        return np.flatnonzero(np.diff(self.lines, prepend=self.lines[:1] - 1))

    def take_rows(self, rows: np.ndarray) -> Examples:
        """All examples of some rows, in that order.

        Example:
          >>> Examples({"x": np.arange(4)}, np.array([1, 2, 2, 5])).take_rows(np.array([1, 0]))["x"].tolist()
          [1, 2, 0]
        """
        firsts = self.firsts
        counts = np.diff(firsts, append=len(self))[rows]
        before = np.cumsum(counts) - counts  # examples that the rows before give
        return self.take(np.repeat(firsts[rows] - before, counts) + np.arange(counts.sum()))

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def __len__(self) -> int:
        return len(self.lines)


def _array(values: Sequence[Any]) -> Any:
    if isinstance(values[0], str):
        return np.asarray(values, object)  # of a fixed width, the longest would give all its size
    return Ragged.of([values]) if isinstance(values[0], Sequence | np.ndarray) else np.asarray(values)


def _joined(parts: Sequence[Any]) -> Any:
    if not isinstance(parts[0], Ragged):
        return np.concatenate(parts)
    starts = np.cumsum([0, *(len(part.flat) for part in parts[:-1])])
    ends = np.concatenate([part.ends + start for part, start in zip(parts, starts, strict=True)])
    return Ragged(np.concatenate([part.flat for part in parts]), ends)
