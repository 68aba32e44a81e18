"""Runs an exported model with numpy and ONNX Runtime alone: text in, label or text out. No jax, no lorax_kit.

    lorax-kit export ADAPTER --format onnx --out runs/exported
    python experiments/run_onnx.py runs/exported "a warm and funny film" "two hours that I want back"

prints `positive 0.97` or the like for each text; without texts, reads one a line from standard input. Of a model that
writes it prints what follows each text:

    lorax-kit export --model smollm2 --format onnx --int8 --out runs/smollm2
    python experiments/run_onnx.py runs/smollm2 --max-new-tokens 8 "The capital of France is"

Tokenizers are BERT's WordPiece (Wu et al., arXiv 1609.08144), greedy: of each word the longest known prefix, then of
the rest; and byte-level BPE (Radford et al., 2019). Others (T5's, Marian's) need the package `tokenizers`.
"""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
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


@cache
def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it is printable, else one from 256 on."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(others)}


class BytePairs:
    """Byte-level BPE of a tokenizer.json: texts to ids and back."""

    def __init__(self, data: dict[str, Any]):
        self.ids: dict[str, int] = data["model"]["vocab"]
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in data["model"]["merges"]]
        self.order = {pair: i for i, pair in enumerate(merges)}
        self.whole = {x["content"]: x["id"] for x in data.get("added_tokens", ())}
        self.special = {x["id"] for x in data.get("added_tokens", ()) if x.get("special")}
        self.tokens = {i: token for token, i in (self.ids | self.whole).items()}
        self.digits = any(x["type"] == "Digits" and x.get("individual_digits") for x in _steps(data))
        self.around = _around(data.get("post_processor"))
        self.letters, self.bytes = byte_letters(), {c: b for b, c in byte_letters().items()}

    @classmethod
    def reads(cls, data: dict[str, Any]) -> bool:
        """Whether the file is of a kind that this class reads."""
        steps = [x for x in _steps(data) if x["type"] != "Digits"]
        plain = [x["type"] for x in steps] == ["ByteLevel"] and not steps[0].get("add_prefix_space")
        regex = plain and steps[0].get("use_regex", True)
        return data["model"].get("type") == "BPE" and not data.get("normalizer") and regex

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text; those that begin and end every text where `special` asks for them."""
        ids = [i for part in self._parts(text) for i in ([part] if isinstance(part, int) else self._pairs(part))]
        return [*self.around[0], *ids, *self.around[1]] if special else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        letters = "".join(self.tokens[i] for i in ids if i not in self.special)
        return bytes(self.bytes.get(c, ord("?")) for c in letters).decode("utf-8", errors="replace")

    def _parts(self, text: str) -> Iterator[int | str]:
        """Tokens that are found whole, and the words between them."""
        while text:
            found = [(text.find(x), -len(x), x) for x in self.whole if x in text]
            at, _, token = min(found, default=(len(text), 0, ""))
            yield from _split(text[:at], self.digits)
            if token:
                yield self.whole[token]
            text = text[at + len(token) :]

    def _pairs(self, word: str) -> list[int]:
        """The word's bytes, of which the pair that was learnt first is merged until none is left."""
        pieces = [self.letters[b] for b in word.encode("utf-8")]
        while len(pieces) > 1:
            first, at = min((self.order.get(pair, 2**31), i) for i, pair in enumerate(pairwise(pieces)))
            if first == 2**31:
                break
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        return [self.ids[piece] for piece in pieces if piece in self.ids]


def _steps(data: dict[str, Any]) -> list[dict[str, Any]]:
    """How a text is split before its bytes are paired."""
    step = data.get("pre_tokenizer") or {"type": "none"}
    return step["pretokenizers"] if step["type"] == "Sequence" else [step]


def _around(post: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    """Ids before and after every text."""
    sides: tuple[list[int], list[int]] = ([], [])
    for step in [] if post is None else post.get("processors", [post]):
        side = 0
        for x in step["single"] if step["type"] == "TemplateProcessing" else ():
            if "Sequence" in x:
                side = 1
            else:
                sides[side].extend(step["special_tokens"][x["SpecialToken"]["id"]]["ids"])
    return sides


def _split(text: str, digits: bool) -> Iterator[str]:
    """GPT-2's words: 's|'t|'re|'ve|'m|'ll|'d| ?letters| ?numbers| ?others|spaces, the last space left to a word."""
    if digits:
        start = 0
        for i, c in enumerate(text):
            if unicodedata.category(c)[0] == "N":
                yield from _split(text[start:i], False)
                yield c
                start = i + 1
        yield from _split(text[start:], False)
        return
    at = 0
    while at < len(text):
        ending = next((x for x in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(x, at)), None)
        end = at + len(ending) if ending else _word_end(text, at)
        yield text[at:end]
        at = end


def _word_end(text: str, at: int) -> int:
    first = at + (text[at] == " " and at + 1 < len(text) and not text[at + 1].isspace())
    kind, end = _kind(text[first]), first
    while end < len(text) and _kind(text[end]) == kind:
        end += 1
    # Of several spaces before a word the last is the word's own, or a token alone.
    return end - 1 if kind == " " and end < len(text) and end - at > 1 else end


def _kind(c: str) -> str:
    if c.isspace() and c not in "\x1c\x1d\x1e\x1f":
        return " "
    kind = unicodedata.category(c)[0]
    return kind if kind in "LN" else "other"


class Packaged:
    """Any other tokenizer.json, by the package `tokenizers`."""

    def __init__(self, file: Path):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            sys.exit(f"{file} is neither WordPiece nor byte-level BPE: it needs `pip install tokenizers`.")
        self.inner = Tokenizer.from_file(str(file))

    def encode(self, text: str, special: bool) -> list[int]:
        return self.inner.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids))


def load_tokenizer(folder: Path, document: dict[str, Any]) -> Any:
    """The tokenizer of an exported folder."""
    settings = dict(document["tokenizer"])
    if "file" in settings:
        data = json.loads((folder / settings["file"]).read_text(encoding="utf-8"))
        return BytePairs(data) if BytePairs.reads(data) else Packaged(folder / settings["file"])
    words = (folder / settings.pop("vocabulary")).read_text(encoding="utf-8").split("\n")[:-1]
    return WordPiece(words, **settings)


def read_factors(file: Path) -> dict[str, np.ndarray]:
    """The fp32 arrays of a safetensors file: the length of its header, the header in JSON, the bytes."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    out, whole = {}, content[start:]
    for name, x in header.items():
        if name != "__metadata__":
            count, at = int(np.prod(x["shape"])), x["data_offsets"][0]
            out[name] = np.frombuffer(whole, "<f4", count, at).reshape(x["shape"])
    return out


class Writer:
    """An exported model that writes: one row of tokens in, the next token's logits out, the cache carried on."""

    def __init__(self, folder: Path, document: dict[str, Any], adapter: str | None):
        self.document, self.parts = document, document["parts"]
        self.sessions = {name: _session(folder / part["file"]) for name, part in self.parts.items()}
        inputs = [item for part in self.parts.values() for item in part["inputs"].items()]
        # Without an adapter a row of zeros each.
        self.factors = {name: np.zeros((1, *x["shape"][1:]), np.float32) for name, x in inputs if "/" in name}
        if adapter is not None:
            file = folder / "adapters" / f"{adapter}.safetensors"
            if not self.factors or not file.is_file():
                sys.exit(f"{folder} has no adapter {adapter!r}, or holds a merged model.")
            self.factors = read_factors(file)

    def tokens(self, ids: Sequence[int], new: int, temperature: float, seed: int) -> Iterator[int]:
        """Tokens after a prompt, up to one that ends a text."""
        rng, held, given = np.random.default_rng(seed), dict(self.factors), np.asarray([ids], np.int32)
        decoder = self.parts["decoder"]
        for name in decoder["carried"].values():
            x = decoder["inputs"][name]
            shape = [n if isinstance(n, int) else {"batch": 1, "past": 0}[n] for n in x["shape"]]
            held[name] = np.zeros(shape, x["dtype"])
        if "encoder" in self.parts:
            mask = np.ones_like(given)
            held |= self._run("encoder", {**held, "ids": given, "mask": mask}) | {"read": mask != 0}
            given = np.asarray([[self.document["start"]]], np.int32)
        for _ in range(new):
            found = self._run("decoder", {**held, "ids": given, "mask": np.ones_like(given)})
            held |= {name: found[output] for output, name in decoder["carried"].items()}
            token = _chosen(found["logits"][0], temperature, rng)
            if token in self.document["eos"]:
                return
            yield token
            given = np.asarray([[token]], np.int32)

    def _run(self, part: str, given: dict[str, Any]) -> dict[str, np.ndarray]:
        about = self.parts[part]
        found = self.sessions[part].run(about["outputs"], {name: given[name] for name in about["inputs"]})
        return dict(zip(about["outputs"], found, strict=True))


def _chosen(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """The likeliest token, or one drawn from softmax(logits / temperature)."""
    if temperature == 0:
        return int(logits.argmax())
    x = logits.astype(np.float64) / temperature
    share = np.exp(x - x.max())
    return int(rng.choice(len(share), p=share / share.sum()))


def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def write(folder: Path, document: dict[str, Any], texts: Sequence[str], options: argparse.Namespace) -> None:
    tokenizer, laid = load_tokenizer(folder, document), document["prompt"]
    writer = Writer(folder, document, options.adapter)
    for text in texts:
        ids = tokenizer.encode(f"{laid['before']}{text}{laid['after']}", laid["special_tokens"])
        if not ids:
            sys.exit(f"{text!r} has no tokens: there is nothing to go on from.")
        longest, before = document["max_length"] or sys.maxsize, [] if "encoder" in document["parts"] else ids
        room = longest - len(before)
        if room < 1 or len(ids) > longest:
            sys.exit(f"a prompt has {len(ids)} tokens, and the model {longest} positions.")
        new = writer.tokens(ids, min(options.max_new_tokens, room), options.temperature, options.seed)
        print(tokenizer.decode([*before, *new]).removeprefix(tokenizer.decode(before)))


def classify(folder: Path, document: dict[str, Any], texts: Sequence[str]) -> None:
    tokenizer, session = load_tokenizer(folder, document), _session(folder / document["file"])
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


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what lorax-kit export wrote")
    parser.add_argument("texts", nargs="*", help="default: the lines of the standard input")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--adapter", help="one of adapters/, of an export with --adapters separate")
    options = parser.parse_intermixed_args(argv)
    texts = options.texts or [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not texts:
        sys.exit("no text: give texts as arguments, or one per line on the standard input.")
    if not (options.folder / "export.json").is_file():
        sys.exit(f"{options.folder} is no folder of lorax-kit export: it has no export.json.")
    document = json.loads((options.folder / "export.json").read_text(encoding="utf-8"))
    if document["format"] != "onnx":
        sys.exit(f"{options.folder} holds {document['format']}; this runs what `lorax-kit export --format onnx` wrote.")
    if "parts" in document:
        write(options.folder, document, texts, options)
    else:
        classify(options.folder, document, texts)


if __name__ == "__main__":
    main(sys.argv[1:])
