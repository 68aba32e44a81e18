"""A path that appears whole or not at all: written beside its place, then renamed into it; a folder of one writer."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lorax_kit.core.setting import shown
from lorax_kit.errors import AdapterError


def place(path: Any) -> Path:
    """An absolute path.

    Raises:
      AdapterError: what names no file: another type, or characters that no name may have.
    """
    try:
        made = Path(path).absolute()
        ok = b"\0" not in os.fsencode(made)
    except (TypeError, ValueError):  # a ValueError: text that the file system cannot encode
        ok = False
    if not ok:
        raise AdapterError(f"the path is {shown(path)}, which names no file.\n  give a str or a Path")
    return made


def refuse_existing(
    path: Path,
    overwrite: bool | None,
    marker: str | None,
    kind: str = "adapter",
    own: Collection[str] = (),
) -> None:
    """Raise `AdapterError` if `path` exists and may not be replaced, or cannot be made.

    Only a folder that holds `marker` ever is, or without a marker a file; `kind` says what such a path is. `overwrite`
    is None where the caller cannot ask for it. `own` are the files that such a folder may hold, relative to it, a
    folder of them ending in "/": one with another file is not replaced. Empty, any file may be there.
    """
    place(path)
    try:
        there = path.exists() or path.is_symlink()
    except OSError as e:  # a name that is too long
        raise _cannot(path, e) from None
    if not there:
        parent = next(p for p in path.absolute().parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise AdapterError(f"{str(path)!r} cannot be made: {str(parent)!r} is no folder that may be written to.")
        return
    if not overwrite:
        way = "choose another path" + ("" if overwrite is None else ", or replace it: overwrite=True")
        raise AdapterError(f"{str(path)!r} exists.\n  {way}")
    if path.is_symlink() or not (path.is_file() if marker is None else (path / marker).exists()):
        raise AdapterError(f"{str(path)!r} exists and is no such {kind}: it is not replaced.\n  choose another path")
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_symlink() or p.is_file())
    other = [name for name in names if name not in own and f"{name.split('/')[0]}/" not in own]
    if own and other:
        raise AdapterError(
            f"{str(path)!r} holds {other[0]!r}, too, which is not written with such {kind}s: it is not replaced.\n"
            "  move that file away, or choose another path"
        )


def refuse_near(path: Path, sources: Collection[Path]) -> None:
    """Raise `AdapterError` if `path` is one of the sources, or lies within or around one: writing would change it."""
    for source in sources:
        one, two = path.resolve(), source.resolve()
        if one == two or one in two.parents or two in one.parents:
            how = "is" if one == two else "lies around" if one in two.parents else "lies within"
            raise AdapterError(
                f"{str(path)!r} {how} {str(source)!r}, which is read: nothing was written.\n  choose another path"
            )


def _cannot(path: Path, e: OSError) -> AdapterError:
    text = str(path)
    text = text if len(text) <= 300 else f"{text[:250]}... ({len(text):,} characters)"
    return AdapterError(f"{text!r} cannot be made: {e.strerror}.\n  choose another path")


@contextmanager
def staged(path: Path, overwrite: bool) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends without an error.

    What stood at `path` is replaced then, and stays as it was if anything fails.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", dir=path.parent))
    except OSError as e:
        raise _cannot(path, e) from None
    try:
        yield folder / "written"
        if overwrite and path.exists():
            path.rename(folder / "replaced")
        try:
            (folder / "written").rename(path)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise AdapterError(f"{str(path)!r} was written by another process meanwhile.") from None
    except BaseException:
        if (folder / "replaced").exists() and not path.exists():
            (folder / "replaced").rename(path)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sole_writer(folder: Path) -> IO[str] | None:
    """An open file that keeps other processes away from a folder until it is closed; None while another has it."""
    file = open(folder / ".lock", "w")  # noqa: SIM115  (held until the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
