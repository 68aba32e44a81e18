"""A path that appears whole or not at all: written beside its place, then renamed into it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorax_kit.core.errors import AdapterError


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise `AdapterError` if `path` exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise AdapterError(f"{str(path)!r} exists.\n  choose another path, or pass overwrite=True")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends without an error.

    What stood at `path` is replaced then, and stays as it was if anything fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder / "written"
        if path.exists():
            path.rename(folder / "replaced")
        (folder / "written").rename(path)
    except BaseException:
        if (folder / "replaced").exists() and not path.exists():
            (folder / "replaced").rename(path)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
