"""The rows of a study as a data frame (the only file with pandas; the `table` extra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorax_kit.errors import StudyError
from lorax_kit.extras import need

if TYPE_CHECKING:
    from pandas import DataFrame


def frame(rows: Sequence[Mapping[str, Any]]) -> DataFrame:
    """A line per row and a column per key, in the order of first appearance; what a row lacks is missing.

    Raises:
      StudyError: pandas is not installed.
    """
    need("table", "pandas", raises=StudyError)
    import pandas

    return pandas.DataFrame.from_records([dict(row) for row in rows])
