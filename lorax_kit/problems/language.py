"""Language modelling on a user's own texts: what a decoder is trained on to continue texts of their kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lorax_kit.data import Examples, Row, key_of, pack, packed, row_stream
from lorax_kit.errors import DataError
from lorax_kit.problem import Problem
from lorax_kit.problems.classify import text_of
from lorax_kit.problems.parts.decoded import decoder_problem
from lorax_kit.problems.parts.rows import TextSettings, facts_of, load, read_parts
from lorax_kit.tasks import Told

DEFAULT_LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class Language(TextSettings):
    """Texts to continue, for a decoder; measured by perplexity.

    Rows are packed: a row of a batch holds several texts, none of which sees another, and each ends with the
    tokenizer's end of text where it has one. Longer texts are cut into pieces.

    Args:
      text: the column. A file NAME.txt has none: its texts are its paragraphs, which empty lines part.
      length: of a row, in tokens; None: 256.
    """

    writes: ClassVar[bool] = True

    model: str = "smollm2"
    text: str = "text"
    batch_size: int = 8

    roles: ClassVar[tuple[str, ...]] = ("text",)

    def build(self) -> Problem:
        """Load weights and data.

        Raises:
          DataError: fewer rows of tokens than a batch, or as `read_parts`.
        """
        loaded = load(self, "lm", "decoder")
        end = list(loaded.special.eos[:1])

        def encode(rows: Sequence[Row]) -> dict[str, Any]:
            texts = [text_of(row, "text") for row in rows]
            ids = [[*row, *end] for row in loaded.tokenizer.encode(texts, 2**31)]
            return {"ids": ids, "key": [key_of(text) for text in texts]}

        data = read_parts(self, encode)
        length = self.length or min(DEFAULT_LENGTH, loaded.positions or DEFAULT_LENGTH)

        def rows_of(part: Examples) -> Told:
            return Told(*packed(part["ids"], pack(part["ids"].lengths, length), length))

        train = rows_of(data.train)
        if len(train.ids) < self.batch_size:
            raise DataError(
                f"{self.data!r} gives {len(train.ids)} rows of {length} tokens, fewer than a batch of "
                f"{self.batch_size}.\n  give less: batch_size=N, or length=N"
            )

        def batches(seed: int, start: int) -> Iterator[Told]:
            for index in row_stream(len(train.ids), batch_size=self.batch_size, seed=seed, start=start):
                yield Told(*(x[index] for x in train))

        def evaluated(part: Examples) -> list[Told]:
            rows = rows_of(part)
            return [_filled(rows, at, self.batch_size) for at in range(0, len(rows.ids), self.batch_size)]

        facts = facts_of(self, data, length, "lm", {}) | {
            "cut": 0,
            "tokens": int(train.mask.astype(bool).sum()),
            "steps_per_epoch": max(len(train.ids) // self.batch_size, 1),
        }
        return decoder_problem(
            "lm", loaded, train=batches, val=evaluated(data.val), test=evaluated(data.test), facts=facts
        )


def _filled(rows: Told, at: int, size: int) -> Told:
    """The batch of rows from `at` on; what is missing at the end holds one token that nobody is to tell."""
    ids, mask, told = (x[at : at + size] for x in rows)
    empty = size - len(ids)
    ids, mask, told = (np.pad(x, ((0, empty), (0, 0))) for x in (ids, mask, told))
    if empty:
        mask[-empty:, 0] = 1
    return Told(ids, mask, told)
