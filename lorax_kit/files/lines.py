"""Files that grow by whole lines."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from lorax_kit.errors import AdapterError, LoraxError
from lorax_kit.files.writing import writing
from lorax_kit.json_text import parse_json


def append(file: Path, text: str, error: type[LoraxError] = AdapterError) -> None:
    """Append lines and make sure they are on disk; where that fails the file is as it was.

    Raises:
      LoraxError: the file cannot be written; of the kind `error`.
    """
    with writing(file, error), open(file, "ab", buffering=0) as opened:
        before, left = opened.tell(), text.encode()
        try:
            while left:
                left = left[opened.write(left) :]
            os.fsync(opened.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                opened.truncate(before)
            raise


def whole_lines(content: bytes) -> list[bytes]:
    """The lines of a file of JSON; half a line at the end, which a kill leaves, does not count.

    Raises:
      ValueError: a byte stands where the last line's end was.
    """
    *lines, rest = content.split(b"\n")
    try:
        parse_json(rest[:-1])
    except ValueError:  # half an object is none
        return lines
    raise ValueError(f"line {len(lines) + 1} ends with {rest[-1:]!r}, not with its end of line")


def read_lines(file: Path) -> list[Any]:
    """The objects of a file of JSON lines; half a line at its end, which a kill leaves, does not count.

    Raises:
      LoraxError: a line that is no JSON, or is not as it was written.
    """
    rows: list[Any] = []
    try:
        for line in whole_lines(file.read_bytes()):
            rows.append(parse_json(line))
    except ValueError as e:
        raise LoraxError(f"{str(file)!r}, line {len(rows) + 1}: {e}.\n  mend or delete that line") from None
    return rows


def cut_to_lines(file: Path) -> None:
    """Cut off the half line at the end that a kill left."""
    text = file.read_bytes() if file.exists() else b""
    if text and not text.endswith(b"\n"):
        os.truncate(file, text.rfind(b"\n") + 1)
