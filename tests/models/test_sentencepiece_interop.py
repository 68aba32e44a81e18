"""Tokenizers of SentencePiece's own files equal those of transformers, by ids and by texts."""

import json
import random

import pytest

from lorax_kit.models.text.sentencepiece import marian_tokenizer, t5_tokenizer

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
spm = pytest.importorskip("sentencepiece")
transformers = pytest.importorskip("transformers")

WORDS = ["the", "a", "frog", "green", "small", "house", "sea", "walks", "über", "façade", "naïve", "garçon", "Straße"]
WORDS += [
    "日本",
    "привет",
    "ﬁne",
    "water",
    "under",
    "and",
    "I",
    "walking",
    "houses",
    "underwater",
    "seaside",
    "greener",
]
ODD = [
    "",
    " ",
    "  the  frog ",
    "\tthe\nfrog\r\n",
    "the frog",
    "☃",
    "a☃☃b ☃",
    "😀 the😀",
    "ﬁne ½ Ⅳ ＡＢＣ",
    "the\u200bfrog",
]
ODD += [
    "e\u0301te\u0301 u\u0308ber",
    "...",
    "((frog))!?",
    "the\u3000frog",
    "x" * 300,
    "日本日本 日本",
    "frog" * 50,
    "</s> a",
]
ODD += [
    "a </s> the",
    "<unk>",
    "the<pad>frog",
    " </s>",
    "a\u00a0 the",
    "\u00adfrog",
    "１２３",
    "Ω≈ç√∫",
    "don't",
    "@@ frog@@the",
]


def texts(count, seed):
    """Odd texts, and random ones of words, characters and spaces."""
    dice = random.Random(seed)
    parts = [*WORDS, " ", " ", "  ", "é", "ß", "😀", "☃", "-", ".", "ñ", "q", "Ж", "🎈", "\t", "１", "@@"]
    return [*ODD, *("".join(dice.choice(parts) for _ in range(dice.randint(0, 40))) for _ in range(count))]


def lines(words, seed):
    dice = random.Random(seed)
    return [" ".join(dice.choice(words) for _ in range(dice.randint(3, 9))) for _ in range(400)]


def train(prefix, words, seed, **settings):
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines(words, seed)),
        model_prefix=str(prefix),
        **{"vocab_size": 90, "hard_vocab_limit": False, "minloglevel": 2, **settings},
    )
    return prefix.with_name(prefix.name + ".model")


def compare(ours, theirs, given, prefixes=("",)):
    given = [prefix + text for text in given for prefix in prefixes]
    ids = ours.encode(given, 2**31)
    differ = [(x, a, b) for x, a in zip(given, ids, strict=True) if a != (b := theirs(x)["input_ids"])]
    assert not differ, (len(differ), len(given), differ[:5])
    dice = random.Random(1)
    rows = ids + [[dice.randrange(len(theirs)) for _ in range(dice.randint(0, 30))] for _ in range(200)]
    for row in rows:
        assert ours.decode(row) == theirs.decode(row, skip_special_tokens=True), row


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nmt_nfkc_cf", "identity"])
def test_marian_splits_and_joins_as_transformers_does(tmp_path, rule):
    code = ">>cmn_hans<<" if rule == "nmt_nfkc_cf" else ">>cmn_Hans<<"  # which would be folded
    settings = {"normalization_rule_name": rule, "user_defined_symbols": ["@@"]}
    # Letters that source.spm lacks are unknown here; in transformers they may be the target's piece that is spelt so.
    settings["required_chars"] = "froschaugünde"
    source = train(tmp_path / "a", WORDS, 0, **settings).rename(tmp_path / "source.spm")
    target = train(tmp_path / "b", ["frosch", "haus", "grün", "der", "see", *WORDS[:8]], 1).rename(
        tmp_path / "target.spm"
    )
    found = [spm.SentencePieceProcessor(model_file=str(x)) for x in (source, target)]
    pieces = [[x.id_to_piece(i) for i in range(x.get_piece_size()) if not x.is_control(i)] for x in found]
    left = [x for x in pieces[0] if x not in pieces[1]][20::9]  # vocab.json lacks them, as real ones lack some
    tokens = sorted({*pieces[0], *pieces[1]} - {"<unk>", *left})
    tokens = ["</s>", "<unk>", *tokens, ">>fra<<", code, "<pad>"]
    (tmp_path / "vocab.json").write_text(json.dumps({x: i for i, x in enumerate(tokens)}))
    ours, theirs = marian_tokenizer(tmp_path), transformers.MarianTokenizer.from_pretrained(tmp_path)
    assert left
    assert len([x for x in pieces[1] if x not in pieces[0]]) > 4
    compare(ours, theirs, texts(400, 2), ["", ">>fra<< ", code, " >>fra<<", "a >>fra<< "])


@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
def test_t5_splits_and_joins_as_transformers_does(tmp_path, rule):
    control = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "user_defined_symbols": ["@@"]}
    train(tmp_path / "a", WORDS, 0, normalization_rule_name=rule, **control).rename(tmp_path / "spiece.model")
    ours, theirs = t5_tokenizer(tmp_path), transformers.T5Tokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.inner.get_vocab_size()
    compare(ours, theirs, texts(400, 3), ["", "<extra_id_0> ", "the <extra_id_99>", "▁"])


def test_only_unigram_is_read(tmp_path):
    file = train(tmp_path / "a", WORDS, 0, model_type="bpe").rename(tmp_path / "spiece.model")
    with pytest.raises(ValueError, match="of the type bpe; unigram alone is read"):
        t5_tokenizer(file.parent)
    file = train(tmp_path / "b", WORDS, 0, byte_fallback=True, vocab_size=400).rename(tmp_path / "spiece.model")
    with pytest.raises(ValueError, match="has another byte_fallback than False"):
        t5_tokenizer(file.parent)
