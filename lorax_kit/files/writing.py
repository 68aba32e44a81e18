"""One error for a path that cannot be written, whatever the system or a library says of it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorax_kit.errors import AdapterError, LoraxError

NEXT_STEPS = {
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some of your quota, or choose another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "choose a folder that may be written to",
    errno.EACCES: "choose a folder that may be written to",
    errno.EPERM: "choose a folder that may be written to",
    errno.EIO: "look at the disk",
    errno.ENOTDIR: "choose another path",
    errno.EEXIST: "move away what has that name",
    errno.EISDIR: "move away the folder of that name",
    errno.ENAMETOOLONG: "choose a shorter path",
}
# How libraries in other languages say it: safetensors "(os error 28)", tensorstore "[os_error_code='28']".
_NUMBER = re.compile(r"os[ _]error(?:_code)?\W*(\d+)", re.IGNORECASE)


@contextmanager
def writing(path: Path, error: type[LoraxError] = AdapterError) -> Iterator[None]:
    """Raise `error` where the block fails because `path`, or what lies beside it, cannot be written.

    Other errors pass: those that this package raises on purpose, and those that tell of other files.
    """
    try:
        yield
    except LoraxError:
        raise
    except Exception as e:
        number = _number(e, path.absolute().parent)
        if number is None:
            raise
        raise error(
            f"{shortened(path)!r} cannot be written: {os.strerror(number)}.\n"
            f"  {NEXT_STEPS[number]}; what stood there is as it was"
        ) from e


def _number(e: BaseException | None, parent: Path) -> int | None:
    """The system's number of what kept a path under `parent` from being written, or None."""
    while e is not None:
        if isinstance(e, OSError):
            named = Path(os.fsdecode(e.filename)).absolute() if isinstance(e.filename, str | bytes) else None
            elsewhere = named is not None and parent not in (named, *named.parents)
            if e.errno in NEXT_STEPS and not elsewhere:
                return e.errno
        elif (told := _NUMBER.search(str(e))) and int(told[1]) in NEXT_STEPS:
            return int(told[1])
        e = e.__cause__ or e.__context__
    return None


def shortened(path: Path) -> str:
    """A path within a line of a message."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:250]}... ({len(text):,} characters)"
