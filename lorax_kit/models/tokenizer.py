"""WordPiece and other tokenizers from a tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers


@dataclass(frozen=True)
class Tokenizer:
    """Texts to ids and back. Any truncation and padding that the file presets is switched off."""

    inner: tokenizers.Tokenizer

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json; a damaged file raises `ValueError`."""
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            raise ValueError(f"{str(path)!r} is not a tokenizer: {e}.") from None
        inner.no_truncation()
        inner.no_padding()
        return cls(inner)

    def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Ids of each text, special tokens included; a longer text keeps its first tokens and its last ([SEP])."""
        out = []
        for encoding in self.inner.encode_batch(list(texts)):
            ids = encoding.ids
            out.append(ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]])
        return out

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.inner.decode(list(ids))
