"""Loading and splitting of the real reviews: sizes, disjointness, balance, a pinned test split, bad files."""

import hashlib
import re

import numpy as np
import pytest

from lorax_kit.data import Reviews, load_reviews, split_reviews

# Every published number of the project is measured on this test split: a change here invalidates them all.
TEST_SPLIT = "b001878ace78370d9a8aeba3e857d4edfa672cac50671efaecc5614f3832ea21"


def normal(text):
    return " ".join(text.casefold().split())


@pytest.fixture(scope="module")
def reviews():
    return load_reviews()


@pytest.fixture(scope="module")
def splits(reviews):
    return split_reviews(reviews)


def test_rotten_tomatoes_has_8530_balanced_reviews(reviews):
    assert len(reviews.texts) == 8530
    assert np.bincount(reviews.labels).tolist() == [4265, 4265]
    assert reviews.labels.dtype == np.int32


def test_the_test_split_is_pinned(splits):
    assert hashlib.sha256("\0".join(splits.test.texts).encode()).hexdigest() == TEST_SPLIT


def test_parts_have_the_sizes_asked_for_and_lose_nothing(reviews, splits):
    assert (len(splits.val.texts), len(splits.test.texts)) == (1000, 1066)
    labels = {}
    for text, label in zip(reviews.texts, reviews.labels, strict=True):
        labels.setdefault(normal(text), set()).add(int(label))
    usable = sum(len(found) == 1 for found in labels.values())
    assert sum(len(part.texts) for part in splits) == usable


@pytest.mark.parametrize("source", ["rotten_tomatoes", "all"])
def test_no_text_stands_in_two_parts(source):
    parts = [[normal(text) for text in part.texts] for part in split_reviews(load_reviews(source))]
    assert len(set().union(*parts)) == sum(len(part) for part in parts)


@pytest.mark.parametrize(("val", "test"), [(1000, 1066), (7, 11), (501, 0)])
def test_val_and_test_are_balanced_to_within_one_example(reviews, val, test):
    made = split_reviews(reviews, val=val, test=test)
    for part, size in ((made.val, val), (made.test, test)):
        negative, positive = np.bincount(part.labels, minlength=2)
        assert negative + positive == size
        assert abs(int(negative) - int(positive)) <= 1


def test_labels_stay_with_their_texts(reviews, splits):
    labels = dict(zip(reviews.texts, reviews.labels.tolist(), strict=True))
    for part in splits:
        assert [labels[text] for text in part.texts] == part.labels.tolist()


def test_a_split_depends_on_its_seed_alone(reviews, splits):
    again, other = split_reviews(reviews), split_reviews(reviews, seed=1)
    for one, two in zip(splits, again, strict=True):
        assert one.texts == two.texts
    assert set(other.test.texts) != set(splits.test.texts)


def test_texts_with_two_labels_are_left_out_and_duplicates_count_once():
    texts = ("Good  film", "good film", "odd", "ODD", "bad", "worse", "fine", "best")
    made = split_reviews(Reviews(texts, np.array([1, 1, 0, 1, 0, 0, 1, 1], np.int32)), val=0, test=2)
    assert sorted(normal(t) for part in made for t in part.texts) == ["bad", "best", "fine", "good film", "worse"]


def test_too_few_reviews_say():
    few = Reviews(("a", "b", "c", "d"), np.array([0, 0, 1, 1], np.int32))
    with pytest.raises(ValueError, match="class 0 has 2 reviews, val=2 and test=2 would leave none to train"):
        split_reviews(few, val=2, test=2)


HEADER = "text,label,source\n"
BAD_FILES = [
    ("", "has no header"),
    ("review,label\nfine,1\n", "has no column 'text'; its columns are review, label"),
    (HEADER, "holds no rows"),
    (HEADER + "fine,1,imdb\n", "has no reviews from 'rotten_tomatoes'"),
    (HEADER + "fine,1,rotten_tomatoes\npoor,2,rotten_tomatoes\n", "line 3: label '2' is out of range"),
    (HEADER + "fine,,rotten_tomatoes\n", "line 2: label is empty"),
    (HEADER + "fine,positive,rotten_tomatoes\n", "line 2: label 'positive' is out of range"),
    (HEADER + '"  ",1,rotten_tomatoes\n', "line 2: text is empty"),
]


@pytest.mark.parametrize(("content", "says"), BAD_FILES)
def test_bad_files_say(tmp_path, content, says):
    file = tmp_path / "reviews.csv"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(says)):
        load_reviews(file=file)


def test_an_unknown_source_says_which_there_are():
    with pytest.raises(ValueError, match="'yelp' is unknown; choose from rotten_tomatoes, imdb, all"):
        load_reviews("yelp")


def test_a_file_of_ones_own_loads(tmp_path):
    file = tmp_path / "reviews.csv"
    file.write_text(HEADER + '"fine, really",1,imdb\npoor,0,rotten_tomatoes\n', encoding="utf-8")
    found = load_reviews("all", file)
    assert found.texts == ("fine, really", "poor")
    assert found.labels.tolist() == [1, 0]
