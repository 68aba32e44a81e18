"""Runs an exported classifier with numpy and ONNX Runtime alone: text in, label out. No jax, no lorax_kit.

    lorax-kit export ADAPTER --format onnx --out runs/exported
    python experiments/run_onnx.py runs/exported "a warm and funny film" "two hours that I want back"

prints `positive 0.97` or the like for each text; without texts, reads one a line from standard input. The tokenizer is
BERT's WordPiece (Wu et al., arXiv 1609.08144), greedy: of each word the longest known prefix, then of the rest.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class WordPiece:
    """Texts to ids, [CLS] and [SEP] included, as the tokenizer that the model was trained with."""

    def __init__(self, words: Sequence[str], lowercase: bool, strip_accents: bool | None, handle_chinese_chars: bool):
        self.ids = {word: i for i, word in enumerate(words)}
        self.lowercase = lowercase
        self.strip_accents = lowercase if strip_accents is None else strip_accents
        self.chinese = handle_chinese_chars

    def encode(self, text: str, max_length: int) -> list[int]:
        """A longer text keeps its first tokens, and [SEP]."""
        ids = [i for word in self._words(text) for i in self._pieces(word)]
        return [self.ids["[CLS]"], *ids[: max_length - 2], self.ids["[SEP]"]]

    def _words(self, text: str) -> list[str]:
        text = "".join(self._clean(c) for c in text)
        if self.strip_accents:
            text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
        text = "".join(map(str.lower, text)) if self.lowercase else text  # each alone: no final sigma
        return "".join(f" {c} " if _punctuation(c) else c for c in text).split()

    def _clean(self, c: str) -> str:
        if c not in "\t\n\r" and (unicodedata.category(c) in ("Cc", "Cf", "Co") or c in "\0\ufffd"):
            return ""
        if c.isspace():
            return " "
        return f" {c} " if self.chinese and _chinese(ord(c)) else c

    def _pieces(self, word: str) -> Iterator[int]:
        unknown, out, start = [self.ids["[UNK]"]], [], 0
        if len(word) > 100:
            return iter(unknown)
        while start < len(word):
            mark = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if mark + word[start:end] in self.ids)
            end = next(ends, None)
            if end is None:
                return iter(unknown)
            out.append(self.ids[mark + word[start:end]])
            start = end
        return iter(out)


def _punctuation(c: str) -> bool:
    return (c.isascii() and c.isprintable() and not c.isalnum() and c != " ") or unicodedata.category(c)[0] == "P"


def _chinese(c: int) -> bool:
    blocks = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F))
    return any(a <= c <= b for a, b in (*blocks, (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)))


def load_tokenizer(folder: Path, document: dict[str, Any]) -> WordPiece:
    """The tokenizer of an exported folder."""
    settings = dict(document["tokenizer"])
    words = (folder / settings.pop("vocabulary")).read_text(encoding="utf-8").split("\n")[:-1]
    return WordPiece(words, **settings)


def main(folder: Path, texts: Sequence[str]) -> None:
    import onnxruntime

    try:
        document = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    except OSError as e:
        sys.exit(f"{folder} is no folder of lorax-kit export: {e}")
    if document["format"] != "onnx":
        sys.exit(f"{folder} holds {document['format']}; this runs what `lorax-kit export --format onnx` wrote.")
    tokenizer = load_tokenizer(folder, document)
    session = onnxruntime.InferenceSession(folder / document["file"], providers=["CPUExecutionProvider"])
    rows = [tokenizer.encode(text, document["max_length"]) for text in texts]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    (logits,) = session.run(None, {"ids": ids, "mask": mask})
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    for text, share in zip(texts, shares, strict=True):
        print(f"{document['labels'][share.argmax()]} {share.max():.4f}  {text}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    given = sys.argv[2:] or [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not given:
        sys.exit("no text: give texts as arguments, or one per line on the standard input.")
    main(Path(sys.argv[1]), given)
