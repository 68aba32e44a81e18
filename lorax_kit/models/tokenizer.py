"""WordPiece, byte-level BPE and other tokenizers: from a tokenizer.json, or from tokens and merges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import tokenizers


class Window(NamedTuple):
    """Tokens of a pair of texts.

    Attributes:
      ids, types: of each token.
      spans: of each token the characters [start, end) of the second text; (-1, -1) where it is of neither or the first.
    """

    ids: list[int]
    types: list[int]
    spans: list[tuple[int, int]]

    @classmethod
    def of(cls, ids: list[int], types: list[int], offsets: list[tuple[int, int]], texts: list[int | None]) -> Window:
        """From what the library gives: `texts` says which of the two a token is of."""
        spans = [span if text == 1 else (-1, -1) for span, text in zip(offsets, texts, strict=True)]
        return cls(ids, types, spans)


@dataclass(frozen=True)
class Tokenizer:
    """Texts to ids and back. Any truncation and padding that the file presets is switched off."""

    inner: tokenizers.Tokenizer

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json; a damaged file raises `ValueError`."""
        import tokenizers

        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            raise ValueError(f"{str(path)!r} is not a tokenizer: {e}.") from None
        inner.no_truncation()
        inner.no_padding()
        return cls(inner)

    @classmethod
    def from_merges(
        cls,
        tokens: Sequence[str],
        merges: Sequence[tuple[str, str]],
        *,
        special: Sequence[str] = (),
        whole: Sequence[str] = (),
        split_digits: bool = False,
        start: str | None = None,
        end: str | None = None,
    ) -> Tokenizer:
        """Byte-level BPE as in GPT-2 (Radford et al., 2019).

        Args:
          tokens: by id, in GPT-2's alphabet of bytes.
          merges: pairs of tokens, the first to be merged first.
          special: tokens with a meaning of their own, found in a text before it is split, and left out by `decode`.
          whole: tokens found likewise, that belong to the text.
          split_digits: every digit is a token of its own, as in SmolLM2.
          start, end: a special token that begins or ends every text.

        Raises:
          ValueError: a merge of tokens that are not there.
        """
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, processors

        ids = {token: i for i, token in enumerate(tokens)}
        try:
            inner = tokenizers.Tokenizer(models.BPE(ids, list(merges)))
        except Exception as e:  # the library raises bare Exception
            raise ValueError(f"these tokens and merges are not a tokenizer: {e}.") from None
        split = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
        inner.pre_tokenizer = pre_tokenizers.Sequence([*digits, split])
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([tokenizers.AddedToken(x, special=True, normalized=False) for x in special])
        inner.add_tokens([tokenizers.AddedToken(x, normalized=False) for x in whole])
        around = [x for x in (start, end) if x is not None]
        if around:
            text = [x for x in (start, "$A", end) if x is not None]
            inner.post_processor = processors.TemplateProcessing(
                single=text, pair=[*text, "$B"], special_tokens=[(x, ids[x]) for x in around]
            )
        return cls(inner)

    @classmethod
    def from_texts(cls, texts: Sequence[str], size: int) -> Tokenizer:
        """Whole words in lower case, punctuation apart: the most frequent of these texts, of equal ones the first.

        Args:
          texts: those to train on, and no others.
          size: of the vocabulary. Id 0 is left to padding, id 1 is every other word.

        Raises:
          ValueError: a size that holds no word, or texts without one.
        """
        import tokenizers
        from tokenizers import models, normalizers, pre_tokenizers

        normalizer = normalizers.Lowercase()
        split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
        counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text)))
        if size < 3 or not counts:
            raise ValueError(
                f"a vocabulary of {size} of {len(counts)} words; it needs a size of at least 3, and a word."
            )
        ids = {"[PAD]": 0, "[UNK]": 1} | {word: i for i, (word, _) in enumerate(counts.most_common(size - 2), 2)}
        inner = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
        inner.normalizer, inner.pre_tokenizer = normalizer, split
        return cls(inner)

    def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Ids of each text, special tokens included.

        A longer text keeps its first tokens, and the special token that ends every text ([SEP]) where there is one.
        """
        out = []
        for encoding in self.inner.encode_batch(list(texts)):
            ids = encoding.ids
            if len(ids) > max_length:
                end = ids[-1:] if encoding.special_tokens_mask[-1] else []
                ids = ids[: max_length - len(end)] + end
            out.append(ids)
        return out

    def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids of each text without further special tokens, and the characters [start, end) that each token is of."""
        found = self.inner.encode_batch(list(texts), add_special_tokens=False)
        return [(x.ids, x.offsets) for x in found]

    def text_of(self, token: int | None) -> str | None:
        """The text that stands for a token; None of None."""
        return None if token is None else self.inner.id_to_token(token)

    def encode_pairs(self, pairs: Sequence[tuple[str, str]], max_length: int, overlap: int) -> list[list[Window]]:
        """Two texts each, special tokens included; a second text that is too long is cut into windows.

        Args:
          max_length: tokens of a window.
          overlap: tokens that a window shares with the one before it.

        Raises:
          ValueError: a first text that leaves no room for the second.
        """
        import tokenizers

        cutting = tokenizers.Tokenizer.from_str(self.inner.to_str())  # truncation is a state of the library's object
        cutting.enable_truncation(max_length, stride=overlap, strategy="only_second")
        out = []
        for first, second in pairs:
            try:
                whole = cutting.encode(first, second)
            except Exception as e:  # the library raises bare Exception
                raise ValueError(
                    f"{first[:60]!r} leaves no room in {max_length} tokens for windows that share {overlap}: {e}."
                ) from None
            windows = [whole, *whole.overflowing]
            out.append([Window.of(x.ids, x.type_ids, x.offsets, x.sequence_ids) for x in windows])
        return out

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.inner.decode(list(ids))
