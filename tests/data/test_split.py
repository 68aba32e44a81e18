"""Splits, packing and ragged rows, against their definitions."""

import numpy as np
import pytest

from lorax_kit.data import Examples, Ragged, Row, key_of, pack, packed, row_stream, split_rows
from lorax_kit.errors import DataError


def test_parts_are_disjoint_stratified_and_of_rows_that_differ():
    rng = np.random.default_rng(0)
    strata = rng.choice(3, 1000, p=[0.7, 0.2, 0.1])
    keys = np.arange(1000)
    keys[990:] = keys[:10]  # ten stand twice
    strata[990:995] = strata[:5]
    strata[995:] = (strata[5:10] + 1) % 3  # and five of them contradict each other
    parts = split_rows(keys, strata, val=0.1, test=100, seed=1)
    assert (parts.equal, parts.contradictory) == (5, 10)
    whole = np.concatenate(parts[:3])
    assert sorted(whole) == [i for i in range(990) if not 5 <= i < 10]
    assert len(parts.test) == 100
    assert len(parts.val) == 98  # a tenth of the 985 that count
    of_all = np.bincount(strata[whole]) / len(whole)
    for part in parts[:3]:
        assert np.abs(np.bincount(strata[part], minlength=3) - of_all * len(part)).max() < 2
    again = split_rows(keys, strata, val=0.1, test=100, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(parts[:3], again[:3], strict=True))
    other = split_rows(keys, strata, val=0.1, test=100, seed=2)
    assert not np.array_equal(parts.test, other.test)


def test_groups_stay_whole():
    groups = np.repeat(np.arange(50), 4)
    parts = split_rows(np.arange(200), val=0.1, test=0.2, groups=groups)
    sets = [set(groups[part]) for part in parts[:3]]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 50
    assert [len(part) for part in parts[:3]] == [140, 20, 40]


def test_too_few_rows_are_an_error():
    with pytest.raises(DataError, match="3 rows that differ are too few for 2 of validation and 1 of test"):
        split_rows(np.array([1, 2, 3, 1]), val=2, test=1)


def test_keys_tell_texts_apart_up_to_case_and_space():
    assert key_of("A  b") == key_of("a b ")
    assert len({key_of("a b"), key_of("ab"), key_of("a", "b"), key_of("a\ud800")}) == 4


def test_packed_rows_hold_every_token_once_and_little_padding():
    rng = np.random.default_rng(0)
    texts = Ragged.of([[rng.integers(1, 99, n) for n in rng.integers(1, 90, 200)]])
    rows = pack(texts.lengths, 64)
    ids, segments, told = packed(texts, rows, 64)
    pieces = sorted(piece for row in rows for piece in row)
    assert np.array_equal(np.concatenate([texts[p.text][p.start : p.end] for p in pieces]), texts.flat)
    for row, line, parts, told_row in zip(rows, ids, segments, told, strict=True):
        for number, piece in enumerate(row, 1):
            at = np.flatnonzero(parts == number)
            assert np.array_equal(line[at], texts[piece.text][piece.start : piece.end])
            assert told_row[at].tolist() == [0, *[1] * (len(at) - 1)]
        assert (line[parts == 0] == 0).all()
    assert len(rows) <= np.ceil(len(texts.flat) / 64) * 1.05


def test_examples_gather_what_is_encoded_across_parts():
    rows = [Row(i, {"n": i}) for i in range(3000)]

    def encode(some):
        return {"ids": [list(range(row.cells["n"] % 5)) for row in some], "text": [str(row.line) for row in some]}

    found = Examples.of(rows, encode)
    assert len(found) == 3000
    assert found["ids"][2049].tolist() == [0, 1, 2, 3]
    taken = found.take(np.array([2999, 7]))
    assert taken["text"].tolist() == ["2999", "7"]
    assert taken["ids"].lengths.tolist() == [4, 2]
    assert taken.lines.tolist() == [2999, 7]


def test_a_stream_goes_on_where_it_is_told_to():
    whole = row_stream(10, batch_size=3, seed=4)
    first = [next(whole).tolist() for _ in range(7)]
    later = row_stream(10, batch_size=3, seed=4, start=4)
    assert [next(later).tolist() for _ in range(3)] == first[4:]
    assert len({i for some in first[:3] for i in some}) == 9
