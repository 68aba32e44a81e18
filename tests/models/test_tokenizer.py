"""A vocabulary of whole words, made from texts."""

import re
from dataclasses import replace

import pytest

from lorax_kit.models import Tokenizer

TEXTS = ["A good, good film!", "a BAD film"]


def test_the_most_frequent_words_have_the_first_ids():
    words = Tokenizer.from_texts(TEXTS, 6)
    assert words.inner.get_vocab() == {"[PAD]": 0, "[UNK]": 1, "a": 2, "good": 3, "film": 4, ",": 5}
    assert words.encode(["Good film, bad film"], 10) == [[3, 4, 5, 1, 4]]
    assert words.encode(["Good film, bad film"], 2) == [[3, 4]]


@pytest.mark.parametrize(("texts", "size"), [(TEXTS, 2), (["  "], 10), ([], 10)])
def test_a_vocabulary_without_words_says_so(texts, size):
    with pytest.raises(ValueError, match="at least 3, and a word"):
        Tokenizer.from_texts(texts, size)


def test_a_token_that_the_model_does_not_have_is_named_with_both_sizes():
    words = replace(Tokenizer.from_texts(TEXTS, 6), size=5)
    assert words.encode(["Good film"], 10) == [[3, 4]]
    says = re.escape("the token ',' has the id 5; the model has 5 tokens, the tokenizer 6.")
    for encode in (
        lambda: words.encode(["film", "good, film"], 10),
        lambda: words.encode_spans(["good, film"]),
        lambda: words.encode_pairs([("good", "a, film")], 10, 2),
    ):
        with pytest.raises(ValueError, match=says):
            encode()
    assert replace(words, unknown=1).encode(["good, film"], 10) == [[3, 1, 4]]


def test_what_is_no_unicode_is_told():
    """As an argument in another encoding, or half a pair of JSON's escapes, comes into a text."""
    tokenizer = Tokenizer.from_texts(TEXTS, 6)
    calls = (
        lambda: tokenizer.encode(["fine", "a\udcffb"], 4),
        lambda: tokenizer.encode_spans(["a\udcffb"]),
        lambda: tokenizer.encode_pairs([("fine", "a\udcffb")], 8, 0),
    )
    for call in calls:
        with pytest.raises(ValueError, match="is no Unicode text: character 1"):
            call()
