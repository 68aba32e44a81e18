"""SentencePiece models (Kudo & Richardson, 2018): the tokenizers of Marian's folders, and of T5's older ones."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax_kit.models.stored.weights import read_json
from lorax_kit.models.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MODELS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5
"""How a field is written: a number of 7 bits a byte, 8 bytes, a length and as many bytes, 4 bytes."""
TRAINING = {24: (False, "treat_whitespace_as_suffix"), 35: (False, "byte_fallback")}
NORMALISING = {
    3: (True, "add_dummy_prefix"),
    4: (True, "remove_extra_whitespaces"),
    5: (True, "escape_whitespaces"),
}
"""Field -> the one value that is read, which is the default, too, and its name."""
MOST_EXTRA = 10_000
"""Of T5's further tokens."""


class Piece(NamedTuple):
    """A piece of text; `kind` is NORMAL, UNKNOWN, ..."""

    text: str
    score: float
    kind: int


class Pieces(NamedTuple):
    """What a file holds: pieces by id, and how characters are replaced before a text is split (empty: they are not)."""

    pieces: list[Piece]
    charsmap: bytes


def read_sentencepiece(file: Path) -> Pieces:
    """Read a file of SentencePiece.

    Raises:
      ValueError: damaged bytes, or cut ones; a model other than unigram; settings that are not read.
    """
    whole = _Message(file.name, file.read_bytes())
    parts: dict[int, _Message] = {}
    pieces: list[Piece] = []
    for number, value in whole.fields():
        if number == 1:
            pieces.append(_piece(whole.part(value)))
        elif number in (2, 3):
            if number in parts:
                raise whole.wrong(whole.at, "a second spec of the same kind")
            parts[number] = whole.part(value)
    for number, name in ((2, "trainer_spec"), (3, "normalizer_spec")):
        if number not in parts:
            raise whole.wrong(whole.end, f"it ends without a {name}")
    for number, value in parts[2].fields():
        if number == 3 and value != 1:
            kind = MODELS.get(value, value) if isinstance(value, int) else "no number"
            raise ValueError(f"{whole.name!r} holds a SentencePiece model of the type {kind}; unigram alone is read.")
        _expect(parts[2], number, value, TRAINING)
    charsmap = b""
    for number, value in parts[3].fields():
        if number == 2:
            spec = parts[3].part(value)
            charsmap = spec.data[spec.start : spec.end]
            _check_charsmap(charsmap, spec)
        _expect(parts[3], number, value, NORMALISING)
    twice = len(pieces) - len({x.text for x in pieces})
    if twice or sum(x.kind == UNKNOWN for x in pieces) != 1:
        raise ValueError(f"{whole.name!r} has {twice} pieces twice, or not one piece that stands for the unknown.")
    return Pieces(pieces, charsmap)


def stored_tokenizer(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a model's folder: its tokenizer.json, else what its SentencePiece files say.

    Args:
      config: the content of its config.json.

    Raises:
      FileNotFoundError: the folder has no tokenizer.
      ValueError: damaged files; more tokens than the model has.
    """
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(folder / "tokenizer.json")
    made = marian_tokenizer(folder) if config.get("model_type") == "marian" else t5_tokenizer(folder)
    count, most = made.size or made.inner.get_vocab_size(), config.get("vocab_size")
    if type(most) is int and count > most:
        raise ValueError(f"the tokenizer in {str(folder)!r} has {count} tokens; config.json says vocab_size {most}.")
    return made


def t5_tokenizer(folder: Path) -> Tokenizer:
    """Of spiece.model: its pieces by their order, then <extra_id_99> to <extra_id_0>; a text ends with </s>.

    As many extra ids as tokenizer_config.json says, where it does.

    Raises:
      ValueError: as `read_sentencepiece`; no </s>; a number of extra ids that is none.
    """
    file, settings = folder / "spiece.model", folder / "tokenizer_config.json"
    pieces, charsmap = read_sentencepiece(file)
    given = read_json(settings) if settings.is_file() else {}
    extra = given.get("extra_ids", 100) if isinstance(given, dict) else 100
    if type(extra) is not int or not 0 <= extra <= MOST_EXTRA:
        raise ValueError(f"{settings.name!r} has extra_ids {extra!r}; it must be an integer from 0 to {MOST_EXTRA:,}.")
    kept = {x.text for x in pieces}
    further = [f"<extra_id_{i}>" for i in reversed(range(extra))]
    if "</s>" not in kept or not kept.isdisjoint(further):
        raise ValueError(f"{file.name!r} has no piece </s>, or pieces with the names of T5's extra ids.")
    special = [x.text for x in pieces if x.kind in (UNKNOWN, CONTROL)] + further
    return Tokenizer.from_pieces(
        [*((x.text, x.score) for x in pieces), *((x, 0.0) for x in further)],
        next(i for i, x in enumerate(pieces) if x.kind == UNKNOWN),
        special=special,
        whole=[x.text for x in pieces if x.kind == USER_DEFINED],
        charsmap=charsmap,
        by_word=True,
    )


def marian_tokenizer(folder: Path) -> Tokenizer:
    """Of source.spm and vocab.json: ids are those of vocab.json, texts are split by the pieces of source.spm.

    Pieces that source.spm lacks, those of target.spm, are decoded and never found in a text (transformers finds one
    where letters unknown to source.spm spell it), but for >>fra<< and the like, found where a text begins. A piece
    that vocab.json lacks stands for the unknown, as in transformers: folders that are in use lack some. A text ends
    with </s>.

    Raises:
      ValueError: as `read_sentencepiece`; a file that is not there; a vocab.json of another kind.
    """
    for name in ("source.spm", "vocab.json"):
        if not (folder / name).is_file():
            raise ValueError(
                f"{str(folder)!r} has no {name}; Marian's tokenizer is tokenizer.json, or source.spm and vocab.json."
            )
    ids = _ids(folder / "vocab.json")
    pieces, charsmap = read_sentencepiece(folder / "source.spm")
    # SentencePiece prefers what a user defined to anything that is learnt.
    best = max((x.score for x in pieces if x.kind == NORMAL), default=0.0)
    scores = {x.text: x.score for x in pieces if x.kind == NORMAL}
    scores |= {x.text: len(x.text.encode()) * best - 0.1 for x in pieces if x.kind == USER_DEFINED}
    special = ["</s>", "<unk>", "<pad>"]
    if not scores.keys() & ids.keys():
        raise ValueError("'vocab.json' has none of the pieces of 'source.spm'; they belong to two models.")
    return Tokenizer.from_pieces(
        [(x, 0.0 if x in special else scores.get(x)) for x in sorted(ids, key=ids.__getitem__)],
        ids["<unk>"],
        special=special,
        codes=[x for x in ids if x.startswith(">>") and x.endswith("<<") and x not in scores],
        missing=[(x, score) for x, score in scores.items() if x not in ids],
        charsmap=charsmap,
    )


def _ids(file: Path) -> dict[str, int]:
    """The content of a vocab.json: token -> id."""
    ids = read_json(file)
    if not isinstance(ids, dict):
        raise ValueError(f"{file.name!r} must hold an object of ids by piece, not {type(ids).__name__}.")
    if lacking := [x for x in ("</s>", "<unk>", "<pad>") if x not in ids]:
        raise ValueError(f"{file.name!r} has no piece {lacking[0]!r}.")
    if not all(type(x) is int for x in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"the ids in {file.name!r} are not 0 to {len(ids) - 1}, each once.")
    if odd := [x for x in ids if not x or " " in x or not _is_text(x)]:
        raise ValueError(f"{file.name!r} has a piece {odd[0][:60]!r}, which is empty, has a space, or is not text.")
    return ids


def _is_text(x: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in x)


def _piece(message: _Message) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in message.fields():
        if number == 1:
            part = message.part(value)
            try:
                text = part.data[part.start : part.end].decode("utf-8")
            except UnicodeDecodeError as e:
                raise message.wrong(part.start + e.start, "a piece that is not UTF-8 text") from None
        elif number == 2:
            if not isinstance(value, bytes) or len(value) != 4:
                raise message.wrong(message.at, "a score that is not of 4 bytes")
            score = struct.unpack("<f", value)[0]
        elif number == 3:
            if not isinstance(value, int) or not NORMAL <= value <= BYTE:
                raise message.wrong(message.at, "a piece of an unknown kind")
            kind = value
    if not text or " " in text or not math.isfinite(score):
        raise message.wrong(message.start, "a piece that is empty or has a space, or a score that is not finite")
    return Piece(text, score, kind)


def _expect(message: _Message, number: int, value: Any, read: Mapping[int, tuple[bool, str]]) -> None:
    """Raises `ValueError` where a setting is not the one that is read."""
    if number in read and value != int(read[number][0]):
        expected, name = read[number]
        raise ValueError(f"{message.name!r} has another {name} than {expected}, which alone is read.")


def _check_charsmap(charsmap: bytes, message: _Message) -> None:
    """Raises `ValueError` where looking characters up would leave the table (a trie by Yata's double array)."""
    size = int.from_bytes(charsmap[:4], "little")
    if not charsmap:
        return
    if len(charsmap) < 8 or size % 4 or not 4 <= size <= len(charsmap) - 4:
        raise message.wrong(message.start, "a table of characters with a wrong size")
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    texts = charsmap[4 + size :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError as e:
        raise message.wrong(message.start + 4 + size + e.start, "characters that are not UTF-8 text") from None
    offsets = (units >> 10) << ((units & (1 << 9)) >> 6)
    begins = (np.frombuffer(texts, np.uint8) & 0xC0) != 0x80  # a character, so a text of the table, may begin here
    seen, waiting = np.zeros(len(units), bool), offsets[:1]
    while waiting.size:
        nodes, waiting = waiting[:4096], waiting[4096:]
        if (nodes | 255).max() >= len(units):
            raise message.wrong(message.start, "a table of characters that leads out of itself")
        nodes = nodes[~seen[nodes]]
        seen[nodes] = True
        steps = nodes[:, None] ^ np.arange(1, 256)
        children = steps[(units[steps] & (1 << 31 | 255)) == np.arange(1, 256)]
        after, ends = children ^ offsets[children], (units[children] >> 8) & 1 == 1
        if after.size and after.max() >= len(units):
            raise message.wrong(message.start, "a table of characters that leads out of itself")
        values = units[after[ends]] & (2**31 - 1)
        if values.size and (values.max() >= len(texts) or not begins[values].all()):
            raise message.wrong(message.start, "a table of characters that leads out of its texts")
        waiting = np.concatenate([waiting, np.unique(after[~seen[after]])])


@dataclass
class _Message:
    """Some bytes of a file in the format of protocol buffers.

    Attributes:
      name, data: of the file.
      start, end: the bytes of it that the message is.
      at: where the field begins that was read last.
    """

    name: str
    data: bytes
    start: int = 0
    end: int = -1
    at: int = 0

    def __post_init__(self) -> None:
        self.end = len(self.data) if self.end < 0 else self.end

    def wrong(self, at: int, what: str) -> ValueError:
        """To be raised."""
        return ValueError(f"{self.name!r} is no SentencePiece model, or damaged: at byte {at:,} {what}.")

    def fields(self) -> Iterator[tuple[int, Any]]:
        """Number and value of each field: an integer, 4 or 8 bytes, or (start, end) in the file."""
        at = self.start
        while at < self.end:
            self.at = at
            key, at = self._number(at)
            number, wire = key >> 3, key & 7
            value: Any
            if wire == VARINT:
                value, at = self._number(at)
            elif wire in (EIGHT, BYTES, FOUR):
                length, at = self._number(at) if wire == BYTES else (8 if wire == EIGHT else 4, at)
                if length > self.end - at:
                    raise self.wrong(self.at, f"a field of {length:,} bytes where {self.end - at:,} are left")
                value = (at, at + length) if wire == BYTES else self.data[at : at + length]
                at += length
            if wire not in (VARINT, EIGHT, BYTES, FOUR) or not number:
                raise self.wrong(self.at, f"a field {number:,} of the unknown type {wire}")
            yield number, value

    def part(self, value: Any) -> _Message:
        """The message that a field holds."""
        if not isinstance(value, tuple):
            raise self.wrong(self.at, "a number where a message or text belongs")
        return _Message(self.name, self.data, *value)

    def _number(self, at: int) -> tuple[int, int]:
        """A number of 7 bits a byte, the last byte below 128; and where it ends."""
        number = 0
        for i in range(10):
            if at + i >= self.end:
                raise self.wrong(at, "a number that is cut")
            number |= (self.data[at + i] & 127) << 7 * i
            if self.data[at + i] < 128:
                return number, at + i + 1
        raise self.wrong(at, "a number of more than 10 bytes")
