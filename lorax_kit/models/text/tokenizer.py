"""WordPiece, byte-level BPE and other tokenizers: from a tokenizer.json, from tokens and merges, or from pieces."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorax_kit.core.specs.setting import shown
from lorax_kit.extras import need

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"
"""What stands for a space in pieces of SentencePiece."""
CODE, OTHER = "\U0010fffd", "\U0010fffc"
"""Private characters: the first begins a token that is found at the start of a text, the second stands for it there."""


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
    """Texts to ids and back. Any truncation and padding that the file presets is switched off.

    Attributes:
      inner: the library's, whose ids may be larger than the model's.
      size: how many tokens the model has; None: not known.
      unknown: the id that stands for all further ones; None: a text that holds one is an error.
    """

    inner: tokenizers.Tokenizer
    size: int | None = None
    unknown: int | None = None

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json; a damaged file raises `ValueError`."""
        need("models", "tokenizers")
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
        need("models", "tokenizers")
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
    def from_pieces(
        cls,
        pieces: Sequence[tuple[str, float | None]],
        unknown: int,
        *,
        special: Sequence[str],
        whole: Sequence[str] = (),
        codes: Sequence[str] = (),
        missing: Sequence[tuple[str, float]] = (),
        charsmap: bytes = b"",
        by_word: bool = False,
    ) -> Tokenizer:
        """Unigram pieces as SentencePiece finds them (Kudo, 2018), and </s> at the end of a text.

        Args:
          pieces: by id, with their scores; None: it is decoded, and never found in a text.
          unknown: the id of what no piece is found in.
          special: tokens with a meaning of their own, found in a text before it is split, and left out by `decode`.
          whole: tokens found likewise, that belong to the text.
          codes: tokens >>...<< that are found where a text begins.
          missing: further pieces, of which the model has no token: they are found, and unknown.
          charsmap: how SentencePiece replaces characters; empty: it does not.
          by_word: texts are split into words first, as transformers does for T5; else as SentencePiece does.

        Raises:
          ValueError: pieces that are not a tokenizer, or codes that `charsmap` replaces.
        """
        need("models", "tokenizers")
        import tokenizers
        from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        least = min((score for _, score in (*pieces, *missing) if score is not None), default=0.0)
        # Every space of a text is replaced before pieces are looked for: one that begins with it is never found.
        hidden = {x: SPACE + CODE + x[2:] if x in set(codes) else f" {x}" for x, score in pieces if score is None}
        vocabulary = [(hidden.get(x, x), least if score is None else score) for x, score in (*pieces, *missing)]
        replaced: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
        if changed := [x for x in codes if replaced and replaced[0].normalize_str(x) != x]:
            raise ValueError(f"the token {changed[0][:60]!r} would be replaced in a text before it is found.")
        try:
            inner = tokenizers.Tokenizer(models.Unigram(vocabulary, unknown))
        except Exception as e:  # the library raises bare Exception
            raise ValueError(f"these pieces are not a tokenizer: {e}.") from None
        if by_word:
            metaspace = pre_tokenizers.Metaspace(SPACE, "always")
            inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
            inner.decoder = decoders.Metaspace(SPACE, "always")
        else:
            known = "|".join(re.escape(x[2:-2]) for x in codes)
            begins = [
                normalizers.Replace(CODE, OTHER),
                normalizers.Replace(Regex(rf"\A>>(?=(?:{known})<<)"), CODE),
                normalizers.Replace(Regex(rf"{CODE}[^<]*\K<<"), "<< "),
            ]
            spaces = [
                normalizers.Replace(Regex(r"\A +| +\z"), ""),
                normalizers.Replace(Regex(" +"), " "),
                normalizers.Prepend(SPACE),
                normalizers.Replace(" ", SPACE),
                normalizers.Replace(Regex(rf"{SPACE}+\z"), ""),
            ]
            replaced = [*(begins if codes else []), *replaced, *spaces]
            shown: list[tuple[Any, str]] = [(SPACE + CODE, ">>"), (Regex(r"\A "), ""), (SPACE, " ")]
            ends = [decoders.Fuse(), decoders.Replace(Regex(r"\A\s+|\s+\z"), "")]
            inner.decoder = decoders.Sequence([*(decoders.Replace(a, b) for a, b in shown), *ends])
        if replaced:
            inner.normalizer = normalizers.Sequence(replaced)
        inner.add_special_tokens([tokenizers.AddedToken(x, special=True, normalized=False) for x in special])
        inner.add_tokens([tokenizers.AddedToken(x, normalized=False) for x in whole])
        pair = ["$A", "</s>", "$B", "</s>"] if by_word else ["$A", "$B", "</s>"]
        inner.post_processor = processors.TemplateProcessing(
            single=["$A", "</s>"], pair=pair, special_tokens=[("</s>", ids["</s>"])]
        )
        return cls(inner, len(pieces), unknown) if missing else cls(inner)

    @classmethod
    def from_texts(cls, texts: Sequence[str], size: int) -> Tokenizer:
        """Whole words in lower case, punctuation apart: the most frequent of these texts, of equal ones the first.

        Args:
          texts: those to train on, and no others.
          size: of the vocabulary. Id 0 is left to padding, id 1 is every other word.

        Raises:
          ValueError: a size that holds no word, or texts without one.
        """
        need("models", "tokenizers")
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

        Raises:
          ValueError: a token that the model does not have; so do the other ways to encode.
        """
        out = []
        for encoding in self.inner.encode_batch(_unicode(texts)):
            ids = self._known(encoding.ids)
            if len(ids) > max_length:
                end = ids[-1:] if encoding.special_tokens_mask[-1] else []
                ids = ids[: max_length - len(end)] + end
            out.append(ids)
        return out

    def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids of each text without further special tokens, and the characters [start, end) that each token is of."""
        encodings = self.inner.encode_batch(_unicode(texts), add_special_tokens=False)
        return [(self._known(x.ids), x.offsets) for x in encodings]

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
        need("models", "tokenizers")
        import tokenizers

        cutting = tokenizers.Tokenizer.from_str(self.inner.to_str())  # truncation is a state of the library's object
        most = max(max_length - cutting.num_special_tokens_to_add(True), 1)
        out = []
        for first, second in map(_unicode, pairs):
            cutting.no_truncation()
            taken = len(cutting.encode(first, "").ids)
            # Where nothing is left beside what windows share, the library ends the process's thread with a panic.
            if max_length - taken <= overlap and len(cutting.encode(first, second).ids) > max_length:
                raise ValueError(
                    f"{first[:60]!r} takes {taken} of a window's {max_length} tokens; the rest must be more than "
                    f"the {overlap} that windows share.\n  shorten it, or give a smaller overlap or a greater length"
                )
            cutting.enable_truncation(max_length, stride=min(overlap, most - 1), strategy="only_second")
            whole = cutting.encode(first, second)
            windows = [whole, *whole.overflowing]
            out.append([Window.of(self._known(x.ids), x.type_ids, x.offsets, x.sequence_ids) for x in windows])
        return out

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.inner.decode(list(ids))

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json all of whose ids the model has: pieces without one are not there, nor found."""
        if self.size is None or self.unknown is None:
            self.inner.save(str(path))
            return
        data = json.loads(self.inner.to_str())
        data["model"]["vocab"] = data["model"]["vocab"][: self.size]
        Path(path).write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")

    def _known(self, ids: list[int]) -> list[int]:
        if self.size is None or max(ids, default=0) < self.size:
            return ids
        if self.unknown is not None:
            return [i if i < self.size else self.unknown for i in ids]
        further = next(i for i in ids if i >= self.size)  # an embedding has no row for it: all that reads it is NaN
        raise ValueError(
            f"the token {shown(self.text_of(further))} has the id {further:,}; the model has {self.size:,} tokens, the "
            f"tokenizer {self.inner.get_vocab_size():,}.\n"
            "  take the tokenizer that came with the model, or a model whose embedding has a row for every token"
        )


def _unicode(texts: Sequence[str]) -> list[str]:
    """The texts; what a wrong encoding or half of a pair of JSON's escapes left in one is told."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise ValueError(f"{text[:60]!r} is no Unicode text: character {e.start} is {text[e.start]!r}.") from None
    return list(texts)
