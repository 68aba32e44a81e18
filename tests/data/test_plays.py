"""Plays as windows of tokens: what is held out, what is left out, and in which order batches come."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lorax_kit.data import load_plays, spread_batches, window_batches, windows
from lorax_kit.tasks import next_tokens


def folder_of(path, count):
    (path / "tragedies").mkdir()
    for i in range(count):
        (path / "tragedies" / f"{i:02d}.md").write_text(f"text {i}", encoding="utf-8")
    return path


def test_every_eighth_play_is_held_out(tmp_path):
    plays = load_plays(folder_of(tmp_path, 17))
    assert plays.test == ("text 7", "text 15")
    assert len(plays.train) == 15
    assert not set(plays.train) & set(plays.test)


def test_windows_do_not_overlap_and_leave_the_rest():
    assert windows(range(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_an_epoch_holds_each_window_once_and_depends_on_the_seed():
    rows = windows(range(40), 4)
    first = [b.ids[:, 0].tolist() for b in itertools.islice(window_batches(rows, batch_size=3, seed=0), 3)]
    again = [b.ids[:, 0].tolist() for b in itertools.islice(window_batches(rows, batch_size=3, seed=0), 3)]
    other = [b.ids[:, 0].tolist() for b in itertools.islice(window_batches(rows, batch_size=3, seed=1), 3)]
    assert first == again != other
    assert len({x for batch in first for x in batch}) == 9  # ten windows fill three batches of three


def test_evaluation_spreads_over_the_text():
    batches = spread_batches(windows(range(100), 5), batch_size=2, count=4)
    assert [b.ids[:, 0].tolist() for b in batches] == [[0, 30], [60, 95]]
    assert all((b.mask == 1).all() for b in batches)


def test_a_label_is_the_token_that_follows():
    ids, mask = jnp.asarray([[3, 4, 5], [6, 7, 0]]), jnp.asarray([[1, 1, 1], [1, 1, 0]])
    label, weight = next_tokens(ids, mask)
    assert label[:, :2].tolist() == [[4, 5], [7, 0]]
    assert weight.tolist() == [[1, 1, 0], [1, 0, 0]]


def test_bad_input_is_named(tmp_path):
    for call, message in (
        (lambda: load_plays(tmp_path), "no .md files"),
        (lambda: load_plays(folder_of(tmp_path, 3)), "has 3 texts"),
        (lambda: windows([1, 2], 4), "2 tokens, fewer than one window of 4"),
        (lambda: windows([1, 2], 1), "nothing to predict"),
        (lambda: window_batches(np.zeros((2, 4), np.int32), batch_size=3, seed=0), "2 rows do not fill"),
        (lambda: spread_batches(np.zeros((2, 4), np.int32), batch_size=1, count=3), "3 of 2 windows"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            call()
    (tmp_path / "tragedies" / "00.md").write_bytes(b"\xff\xfe")
    folder = tmp_path / "more"
    folder.mkdir()
    folder_of(folder, 8)
    (folder / "tragedies" / "03.md").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_plays(folder)
