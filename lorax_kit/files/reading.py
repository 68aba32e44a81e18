"""Reading what another process may replace meanwhile: all of the old or all of the new, never a part of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lorax_kit.errors import AdapterError
from lorax_kit.files.staging import clear_stale, is_being_replaced, place
from lorax_kit.files.writing import shortened

P = ParamSpec("P")
Value = TypeVar("Value")
TRIES, PAUSE = 1000, 0.01


def read_whole(read: Callable[P, Value]) -> Callable[P, Value]:
    """A function that reads a path, its first argument, in several steps; called again where it was replaced meanwhile.

    `staged` moves a folder away before the new one takes its place, so that a reader may find neither, or files of
    both. What was replaced has another inode or another time of its last change.

    Raises:
      AdapterError: replaced again and again; and what `read` raises of a path that stays as it is.
    """

    called = signature(read)
    first = next(iter(called.parameters))

    @wraps(read)
    def reader(*args: P.args, **kwargs: P.kwargs) -> Value:
        given = called.bind(*args, **kwargs)
        where = given.arguments[first] = place(given.arguments[first])
        for _ in range(TRIES):
            before = _stamp(where)
            if before is None:
                clear_stale(where.parent)  # a writer that was killed may have moved it away
                if is_being_replaced(where):
                    time.sleep(PAUSE)
                    continue
                before = _stamp(where)
            try:
                found = read(*given.args, **given.kwargs)
            except Exception:
                if _stamp(where) == before:
                    raise
                continue
            if _stamp(where) == before:
                return found
        raise AdapterError(f"{shortened(where)!r} is replaced again and again while it is read.\n  call again")

    return reader


def _stamp(path: Path) -> Any:
    """Tells one file or folder from what takes its place; None where there is nothing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns
