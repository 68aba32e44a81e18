"""`results.table()` is the rows as a data frame, and says what to install where pandas is missing."""

import sys
from pathlib import Path

import pytest

import lorax_kit as lk

ROWS = [
    {"trial": "a", "rank": 1, "test_accuracy": 0.5, "status": "done"},
    {"trial": "b", "rank": 1, "test_accuracy": None, "status": "diverged"},
    {"trial": "c", "rank": 4, "test_accuracy": 0.75, "status": "done", "hyper_beta": 2.0},
]


def test_the_frame_holds_the_rows():
    pytest.importorskip("pandas")
    table = lk.Results(ROWS, Path(), 1).table()
    assert list(table.columns) == ["trial", "rank", "test_accuracy", "status", "hyper_beta"]
    assert table.shape == (3, 5)
    assert table.loc[table["rank"] == 1, "test_accuracy"].mean() == 0.5, "what is missing enters no mean"
    assert table["hyper_beta"].isna().tolist() == [True, True, False]


def test_without_pandas_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(lk.errors.StudyError, match=r"install the extra: pip install 'lorax_kit\[table\]'"):
        lk.Results(ROWS, Path(), 1).table()
