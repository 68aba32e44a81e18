"""The rows of a study as a data frame (the only file with pandas; the `table` extra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorax_kit.errors import StudyError

if TYPE_CHECKING:
    from pandas import DataFrame


def frame(rows: Sequence[Mapping[str, Any]]) -> DataFrame:
    """A line per row and a column per key, in the order of first appearance; what a row lacks is missing.

    Raises:
      StudyError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise StudyError(
            "a data frame needs pandas, which is not installed.\n  install the extra: pip install 'lorax_kit[table]'"
        ) from None
    return pandas.DataFrame.from_records([dict(row) for row in rows])
