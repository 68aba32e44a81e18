"""Files of SentencePiece, made by hand: Marian's and T5's folders without a tokenizer.json, and damaged ones."""

import json
import re
import struct

import jax
import numpy as np
import pytest

from lorax_kit.models import Tokenizer, load_model, save_model
from lorax_kit.models.text.sentencepiece import marian_tokenizer, read_sentencepiece, t5_tokenizer
from tests.models.test_families import copied

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)
FEW = [("▁", -2.0), ("▁a", -2.5), ("▁ab", -3.0), ("b", -3.5), ("c", -4.0)]
SOURCE = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), *((*x, NORMAL) for x in FEW)]
T5 = [("<pad>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN), *((*x, NORMAL) for x in FEW)]
MARIAN = ["</s>", "<unk>", "▁", "▁a", "▁ab", "b", "▁ziel", "c", ">>fra<<", "<pad>"]


def field(number, value):
    """A field of a protocol buffer: text, bytes, a float, or an integer below 128."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


UNIGRAM = field(3, 1)


def charsmap(pairs):
    """A table that replaces single ASCII characters: a double array of 512 units, and texts that end with a zero."""
    units, texts = np.zeros(512, "<u4"), b""
    units[0] = 256 << 10
    for old, new in pairs:
        at = 256 ^ ord(old)
        leaf = 128 ^ ord(old)  # any place that no other unit has
        units[at], units[leaf] = (at ^ leaf) << 10 | 1 << 8 | ord(old), 1 << 31 | len(texts)
        texts += new.encode() + b"\0"
    return struct.pack("<I", units.nbytes) + units.tobytes() + texts


def spm(pieces, trainer=UNIGRAM, normalizer=b"", table=b""):
    parts = [field(1, field(1, text) + field(2, score) + field(3, kind)) for text, score, kind in pieces]
    return b"".join(parts) + field(2, trainer) + field(3, (field(2, table) if table else b"") + normalizer)


def marian(folder, source=None, vocab=None):
    folder.mkdir(exist_ok=True)
    (folder / "source.spm").write_bytes(spm(SOURCE) if source is None else source)
    tokens = {x: i for i, x in enumerate(MARIAN)} if vocab is None else vocab
    (folder / "vocab.json").write_text(json.dumps(tokens))
    return folder


def t5(folder, model=None, extra=2):
    folder.mkdir(exist_ok=True)
    (folder / "spiece.model").write_bytes(spm(T5) if model is None else model)
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": extra}))
    return folder


def test_marian_there_and_back(tmp_path):
    made = marian_tokenizer(marian(tmp_path / "x"))
    cases = {"ab  a": [4, 3, 0], " acb ": [3, 7, 5, 0], "": [0], "b": [2, 5, 0], "a zz ab": [3, 2, 1, 4, 0]}
    cases |= {">>fra<< ab": [8, 4, 0], ">>fra<<ab": [8, 4, 0], "a</s>": [3, 0, 0], "ab <unk>": [4, 1, 0]}
    assert dict(zip(cases, made.encode(list(cases), 99), strict=True)) == cases
    assert made.encode(["ab a ab"], 3) == [[4, 3, 0]]
    for text in ("ab a", "acb", "b", ">>fra<< ab c"):
        assert made.decode(made.encode([text], 99)[0]) == text
    assert made.decode([8, 6, 4, 9, 0]) == ">>fra<< ziel ab"
    assert made.encode_spans(["ab  a"]) == [([4, 3], [(0, 2), (3, 5)])]


def test_what_the_target_alone_has_is_never_found_nor_are_codes_within_a_text(tmp_path):
    made = marian_tokenizer(marian(tmp_path / "x"))
    odd = ["ziel", " ziel", "▁ziel", "a ziel", "a >>fra<<", " >>fra<<", "\U0010fffdfra<<", "▁\U0010fffdfra<<"]
    for ids in made.encode(odd, 99):
        assert not {6, 8} & set(ids)
        assert max(ids) < len(MARIAN)


def test_a_piece_that_vocab_json_lacks_is_unknown_and_not_saved(tmp_path):
    left = {x: i for i, x in enumerate(x for x in MARIAN if x != "▁ab")}
    made = marian_tokenizer(marian(tmp_path / "x", vocab=left))
    assert made.encode(["ab a"], 9) == [[left["<unk>"], left["▁a"], 0]]
    assert made.encode_spans(["ab"])[0][0] == [left["<unk>"]]
    assert made.encode_pairs([("ab", "ab a")], 9, 0)[0][0].ids == [left["<unk>"], left["<unk>"], left["▁a"], 0]
    made.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again.encode(["ab a"], 9) == [[left["▁a"], left["b"], left["▁a"], 0]]


def test_t5_there_and_back(tmp_path):
    made = t5_tokenizer(t5(tmp_path / "x"))
    cases = {"ab  a": [5, 4, 1], "": [1], "a zz": [4, 3, 2, 1], "a <extra_id_0> b": [4, 9, 3, 6, 1]}
    cases |= {"<extra_id_1>a</s>": [8, 4, 1, 1]}
    assert dict(zip(cases, made.encode(list(cases), 99), strict=True)) == cases
    assert made.decode([5, 4, 9, 1]) == "ab a"
    (tmp_path / "x" / "tokenizer_config.json").unlink()
    assert t5_tokenizer(tmp_path / "x").text_of(8) == "<extra_id_99>"


def test_characters_are_replaced_and_what_a_user_defined_comes_first(tmp_path):
    table = charsmap([("A", "a"), ("\t", " ")])
    source = spm([*SOURCE, ("cb", 0.0, USER_DEFINED), ("cc", -1.0, UNUSED)], table=table)
    made = marian_tokenizer(marian(tmp_path / "x", source, {x: i for i, x in enumerate([*MARIAN, "cb"])}))
    assert made.encode(["A\tA", "acb", "cc"], 9) == [[3, 3, 0], [3, 10, 0], [2, 7, 7, 0]]
    assert t5_tokenizer(t5(tmp_path / "y", spm(T5, table=table))).encode(["A\tA"], 9) == [[4, 4, 1]]


def test_a_folder_loads_and_what_is_saved_loads_again(tmp_path):
    for family, made in (("marian", marian), ("t5", t5)):
        folder = copied(family, tmp_path / family)
        (folder / "tokenizer.json").unlink()
        loaded = load_model(made(folder))
        save_model(tmp_path / f"{family} again", loaded)
        again = load_model(tmp_path / f"{family} again")
        assert not (tmp_path / f"{family} again" / "tokenizer.json").exists()
        assert again.tokenizer.encode(["ab a zz"], 9) == loaded.tokenizer.encode(["ab a zz"], 9)
        assert again.tokenizer.inner.to_str() == loaded.tokenizer.inner.to_str()
        jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(tmp_path):
    folder = copied("t5", tmp_path / "x")
    (folder / "tokenizer.json").unlink()
    t5(folder, extra=100)
    with pytest.raises(ValueError, match=r"has 108 tokens; config\.json says vocab_size 20"):
        load_model(folder)
    (folder / "spiece.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json; (.|\n)*may have spiece\.model"):
        load_model(folder)


@pytest.mark.parametrize("table", [b"", charsmap([("A", "a"), ("B", "b")])], ids=["plain", "replacing"])
def test_every_cut_and_every_flipped_byte_loads_or_says_so(tmp_path, table):
    whole, file = spm(T5, field(3, 1) + field(4, 8), table=table), tmp_path / "spiece.model"
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        with pytest.raises(
            ValueError, match=r"'spiece\.model' is no SentencePiece model, or damaged: at byte \d+"
        ) as e:
            read_sentencepiece(file)
        assert len(str(e.value).splitlines()) == 1
    read = 0
    for at in range(len(whole)):
        for change in (0xFF, 1 << at % 8):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
            try:
                made = t5_tokenizer(tmp_path)
            except ValueError as e:
                assert len(str(e).splitlines()) == 1
                continue
            made.decode(made.encode(["ab AB zz é", "".join(map(chr, range(1, 256)))], 999)[0])
            read += 1
    assert 0 < read < 2 * len(whole)


OTHERS = {x: i for i, x in enumerate(MARIAN)}
BAD = [
    (
        spm(SOURCE, field(3, 2)),
        None,
        "'source.spm' holds a SentencePiece model of the type bpe; unigram alone is read.",
    ),
    (spm(SOURCE, field(35, 1)), None, "has another byte_fallback than False, which alone is read"),
    (spm(SOURCE, normalizer=field(3, 0)), None, "has another add_dummy_prefix than True, which alone is read"),
    (spm(SOURCE[1:]), None, "not one piece that stands for the unknown"),
    (spm([*SOURCE, SOURCE[-1]]), None, "has 1 pieces twice"),
    (spm([*SOURCE, ("x", float("nan"), NORMAL)]), None, "a score that is not finite"),
    (b"\x0b", None, "at byte 0 a field 1 of the unknown type 3"),
    (b"\xff" * 11, None, "at byte 0 a number of more than 10 bytes"),
    (b"\x0a\xff\xff\xff\xff\x0f", None, "at byte 0 a field of 4,294,967,295 bytes where 0 are left"),
    (spm(SOURCE, table=b"\x04\0\0\0\0\x04\0\0"), None, "a table of characters that leads out of itself"),
    (None, [], "'vocab.json' must hold an object of ids by piece, not list."),
    (None, {k: v for k, v in OTHERS.items() if k != "<pad>"}, "'vocab.json' has no piece '<pad>'."),
    (None, OTHERS | {"c": 70}, "the ids in 'vocab.json' are not 0 to 9, each once."),
    (None, OTHERS | {"c": 6}, "the ids in 'vocab.json' are not 0 to 9, each once."),
    (None, OTHERS | {"c": "7"}, "the ids in 'vocab.json' are not 0 to 9, each once."),
    (None, OTHERS | {"c": True}, "the ids in 'vocab.json' are not 0 to 9, each once."),
    (None, OTHERS | {" c": 10}, "'vocab.json' has a piece ' c', which is empty, has a space, or is not text."),
    (None, {"</s>": 0, "<unk>": 1, "<pad>": 2}, "'vocab.json' has none of the pieces of 'source.spm'"),
]


@pytest.mark.parametrize(("source", "vocab", "says"), BAD)
def test_bad_files_say(tmp_path, source, vocab, says):
    with pytest.raises(ValueError, match=re.escape(says)) as e:
        marian_tokenizer(marian(tmp_path / "x", source, vocab))
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["source.spm", "vocab.json"])
def test_a_missing_file_says(tmp_path, name):
    folder = copied("marian", tmp_path / "x")
    (folder / "tokenizer.json").unlink()
    (marian(folder) / name).unlink()
    with pytest.raises(ValueError, match=f"has no {re.escape(name)}; Marian's tokenizer is tokenizer.json, or "):
        load_model(folder)


@pytest.mark.parametrize("extra", [-1, "2", 10**7, True])
def test_a_bad_number_of_extra_ids_says(tmp_path, extra):
    with pytest.raises(ValueError, match=r"has extra_ids .*; it must be an integer from 0 to 10,000"):
        t5_tokenizer(t5(tmp_path / "x", extra=extra))
