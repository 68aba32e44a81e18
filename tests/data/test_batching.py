"""Batches: deterministic, resumable, each example once, weights and truncation; bad inputs."""

import itertools
import re

import numpy as np
import pytest

from lorax_kit.data import encoded, eval_batches, train_batches
from lorax_kit.models import Tokenizer, load_bert

CLS, SEP = 101, 102


def example(i, length):
    """An example that tells who it is: [CLS] i i ... [SEP]."""
    return [CLS, *[1000 + i] * (length - 2), SEP]


LENGTHS = [3 + (7 * i) % 17 for i in range(23)]
DATA = encoded([example(i, n) for i, n in enumerate(LENGTHS)], np.arange(23) % 3, 3)


def who(batch):
    return [int(row[1]) - 1000 for row, weight in zip(batch.ids, batch.weight, strict=True) if weight]


def take(n, **changes):
    settings = {"batch_size": 4, "length": 8, "seed": 0} | changes
    return list(itertools.islice(train_batches(DATA, **settings), n))


def test_training_batches_depend_on_seed_and_epoch_alone():
    for one, two in zip(take(12), take(12), strict=True):
        for x, y in zip(one, two, strict=True):
            np.testing.assert_array_equal(x, y)
    first, second = ([who(b) for b in take(10)[5 * e : 5 * e + 5]] for e in (0, 1))
    assert first != second
    assert first != [who(b) for b in take(5, seed=1)]


@pytest.mark.parametrize("start", [1, 4, 5, 13])
def test_start_equals_skipping(start):
    for one, two in zip(take(start + 7)[start:], take(7, start=start), strict=True):
        for x, y in zip(one, two, strict=True):
            np.testing.assert_array_equal(x, y)


def test_each_example_comes_at_most_once_in_an_epoch():
    for epoch in range(3):
        seen = [i for b in take(15)[5 * epoch : 5 * epoch + 5] for i in who(b)]
        assert len(set(seen)) == len(seen) == 20


def test_training_batches_have_one_shape_and_full_weight():
    for batch in take(10):
        assert batch.ids.shape == batch.mask.shape == (4, 8)
        assert [x.dtype for x in batch] == [np.int32, np.int32, np.int32, np.float32]
        np.testing.assert_array_equal(batch.weight, 1)
        np.testing.assert_array_equal(batch.label, np.array(who(batch)) % 3)


SEVERAL = {"length": (6, 12, 20)}


def test_several_lengths_pad_no_more_than_needed_and_start_with_the_greatest():
    per_epoch = len(DATA.ids) // 4
    for epoch in range(3):
        batches = take(per_epoch * (epoch + 1), **SEVERAL)[per_epoch * epoch :]
        assert batches[0].ids.shape == (4, 20)
        seen = [i for b in batches for i in who(b)]
        assert len(set(seen)) == len(seen) == 4 * per_epoch
        for batch in batches:
            length, longest = batch.ids.shape[1], max(LENGTHS[i] for i in who(batch))
            # What fills no batch of its own length moves up by one: at least one example needs this length.
            assert length == min(n for n in SEVERAL["length"] if n >= longest)


def test_several_lengths_come_in_an_order_that_depends_on_the_epoch_alone():
    shapes = [[b.ids.shape for b in take(15, seed=s, **SEVERAL)] for s in (0, 1)]
    assert shapes[0] == shapes[1]
    assert [who(b) for b in take(5, **SEVERAL)] != [who(b) for b in take(5, seed=1, **SEVERAL)]
    for start in (1, 5, 13):
        for one, two in zip(take(start + 7, **SEVERAL)[start:], take(7, start=start, **SEVERAL), strict=True):
            np.testing.assert_array_equal(one.ids, two.ids)


@pytest.mark.parametrize("buckets", [(6, 12), (4,), (30, 8, 8)])
def test_evaluation_covers_each_example_exactly_once(buckets):
    batches = eval_batches(DATA, batch_size=4, buckets=buckets)
    assert sorted(i for b in batches for i in who(b)) == list(range(23))
    assert sum(float(b.weight.sum()) for b in batches) == 23
    for batch in batches:
        assert batch.ids.shape[0] == 4
        for i in who(batch):
            fits = [n for n in sorted(buckets) if n >= LENGTHS[i]]
            assert batch.ids.shape[1] == (fits[0] if fits else max(buckets))
        labels = batch.label[batch.weight == 1]
        np.testing.assert_array_equal(labels, np.array(who(batch)) % 3)


def test_filling_rows_weigh_nothing_and_keep_one_token():
    batch = eval_batches(DATA, batch_size=50, buckets=(20,))[0]
    np.testing.assert_array_equal(batch.weight, np.arange(50) < 23)
    np.testing.assert_array_equal(batch.mask[23:].sum(1), 1)


def test_truncation_keeps_the_first_tokens_and_the_last():
    for batch in [*take(10), *eval_batches(DATA, batch_size=4, buckets=(5, 8))]:
        length = batch.ids.shape[1]
        for ids, mask, weight in zip(batch.ids, batch.mask, batch.weight, strict=True):
            if not weight:
                continue
            n = int(mask.sum())
            i = int(ids[1]) - 1000
            assert n == min(LENGTHS[i], length)
            assert ids[:n].tolist() == example(i, n)
            np.testing.assert_array_equal(ids[n:], 0)
            np.testing.assert_array_equal(mask[:n], 1)


def test_the_real_tokenizers_texts_are_cut_from_cls_to_sep():
    tokenizer = Tokenizer.from_file(load_bert().tokenizer_file)
    ids = tokenizer.encode(["good", "a long and winding film about nothing at all"], 64)
    batch = next(train_batches(encoded(ids, np.array([1, 0]), 2), batch_size=2, length=6, seed=0))
    for row, mask in zip(batch.ids, batch.mask, strict=True):
        assert (row[0], row[mask.sum() - 1]) == (CLS, SEP)


ENCODED = [
    ([], [], "the data set is empty"),
    ([[1], [2]], [0], "there are 2 examples and 1 labels"),
    ([[1], []], [0, 1], "example 1 has length 0"),
    ([[1], [2]], [0, 2], "example 1 has label 2, out of range for 2 classes"),
    ([[1], [2]], [-1, 0], "example 0 has label -1"),
]


@pytest.mark.parametrize(("ids", "labels", "says"), ENCODED)
def test_bad_examples_say(ids, labels, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        encoded(ids, np.array(labels, int), 2)


BATCHES = [
    (lambda: train_batches(DATA, batch_size=24, length=8, seed=0), "23 examples do not fill one batch of 24"),
    (lambda: train_batches(DATA, batch_size=0, length=8, seed=0), "batches of 0 x 8 tokens"),
    (lambda: train_batches(DATA, batch_size=4, length=1, seed=0), "batches of 4 x 1 tokens"),
    (lambda: train_batches(DATA, batch_size=4, length=[], seed=0), "batches of 4 x [] tokens"),
    (lambda: train_batches(DATA, batch_size=4, length=(1, 8), seed=0), "need at least 1 x 2"),
    (lambda: eval_batches(DATA, batch_size=4, buckets=[]), "buckets [] with batches of 4"),
    (lambda: eval_batches(DATA, batch_size=4, buckets=[1, 8]), "need lengths of at least 2"),
    (lambda: eval_batches(DATA, batch_size=0, buckets=[8]), "with batches of 0"),
]


@pytest.mark.parametrize(("make", "says"), BATCHES)
def test_bad_batches_say(make, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        make()
