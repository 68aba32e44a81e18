"""What may be wrong with an installation."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """Something wrong, or surprising.

    Attributes:
      what: what is so.
      mend: what to do about it.
      fatal: results cannot be trusted, or nothing runs; else it is good to know.
    """

    what: str
    mend: str
    fatal: bool = False
