"""The verdict fails where it should."""

import json
import time

import pytest

import lorax_kit as lk
from tests.fuzz.verdict import NOTHING, taken


def compute():
    end = time.thread_time() + 1.1
    while time.thread_time() < end:
        pass


def test_a_value_and_an_error_in_words_pass(tmp_path):
    assert taken(lambda: 3) == 3
    assert taken(lambda: (tmp_path / "a").write_text("a"), tmp_path) == 1
    assert taken(lambda: lk.LoRA(rank=0)) is NOTHING


@pytest.mark.parametrize("leak", [lambda: json.loads("{"), lambda: {}["a"], lambda: b"\xff".decode(), lambda: 1 + "a"])
def test_errors_of_others_fail(leak):
    with pytest.raises((ValueError, KeyError, TypeError)):
        taken(leak)


def test_a_write_elsewhere_and_a_slow_input_fail(tmp_path):
    (tmp_path / "own").mkdir()
    for change in (lambda: (tmp_path / "a").write_text("a"), lambda: (tmp_path / "b").mkdir()):
        with pytest.raises(AssertionError):
            taken(change, tmp_path / "own")
    with pytest.raises(AssertionError, match=r"1\.\d\d s"):
        taken(compute)
