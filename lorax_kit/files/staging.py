"""A path that appears whole or not at all: written beside its place, then renamed into it; a folder of one writer."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import re
import shutil
import string
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lorax_kit.core.specs.setting import shown
from lorax_kit.errors import AdapterError, LoraxError
from lorax_kit.files.writing import shortened, writing

_NEW, _OLD, _LOCK, _SUFFIX = "written", "replaced", ".lock", ".staged"
_STAGING = re.compile(r"\..*\.\w{8}" + re.escape(_SUFFIX), re.DOTALL)  # a name may have any character


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
    except FileNotFoundError:
        gone = "the current folder was removed, and the path is relative.\n  change to one that is there"
        raise AdapterError(gone) from None
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

    Args:
      overwrite: whether the caller asked to replace it; None: the caller has no such option.
      marker: a folder may be replaced only if it contains this file; None: only a file may.
      kind: what messages call it.
      own: files that such a folder may hold, relative to it, a folder of them ending in "/": a folder with another file
        is not replaced. Empty: any.
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
    return AdapterError(f"{shortened(path)!r} cannot be made: {e.strerror}.\n  choose another path")


@contextmanager
def staged(path: Path, overwrite: bool) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends without an error.

    What stood at `path` is replaced then, and stays as it was if anything fails. The folder that both pass through is
    locked while its process lives: `clear_stale` removes those of processes that were killed.

    Raises:
      AdapterError: `path` cannot be written, or another process wrote it meanwhile.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_stale(path.parent)
    except OSError as e:
        raise _cannot(path, e) from None
    folder, held = _free_name(path), None  # its name first: an interruption may come at once when it is made
    try:
        try:
            while (held := _made(folder)) is None:
                folder = _free_name(path)
        except OSError as e:
            raise _cannot(path, e) from None
        with writing(path):
            yield folder / _NEW
            _put(folder, path, overwrite)
    except BaseException:
        _put_back(folder)
        raise
    finally:
        try:
            _remove(folder)
        except BaseException:  # an interruption that comes now
            _remove(folder)
            raise
        finally:
            if held is not None:
                os.close(held)


def _remove(folder: Path) -> None:
    """Remove a folder into which threads of a library that gave up may still write, for a second at most."""
    for pause in (0.0, 0.01, 0.1, 0.9):
        time.sleep(pause)
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part."""
    with staged(path, overwrite=True) as new:
        new.write_bytes(content)


def clear_stale(parent: Path) -> None:
    """Remove the staging folders that killed processes left in a folder; put back what they were about to replace."""
    for folder in _staging_folders(parent):
        held = _locked(folder)
        if held is not None:
            _put_back(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)


def is_being_replaced(path: Path) -> bool:
    """Whether a writer has moved a folder away and has not put the new one into its place yet."""
    return any(os.path.lexists(folder / _OLD / path.name) for folder in _staging_folders(path.parent))


def _staging_folders(parent: Path) -> list[Path]:
    """Those of all writers to a folder; none where it cannot be listed."""
    try:
        return [parent / entry.name for entry in os.scandir(parent) if _STAGING.fullmatch(entry.name)]
    except OSError:
        return []


def is_begun(folder: Path) -> bool:
    """Whether a folder holds nothing but empty folders and what a writer leaves that was stopped before its results."""
    return all(p.name == _LOCK or _STAGING.fullmatch(p.name) or (p.is_dir() and is_begun(p)) for p in folder.iterdir())


def sole_writer(folder: Path, error: type[LoraxError] = AdapterError) -> IO[str]:
    """An open file that keeps other processes from writing to a folder until it is closed.

    Raises:
      LoraxError: another process has it, or the folder cannot be written; of the kind `error`.
    """
    with writing(folder / _LOCK, error):
        file = open(folder / _LOCK, "w")  # noqa: SIM115  (held until the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise error(f"another process is writing to {str(folder)!r}.\n  wait for it, or stop it") from None
    return file


def _free_name(path: Path) -> Path:
    """A folder beside `path` that nothing else has."""
    while True:
        word = "".join(random.SystemRandom().choices(string.ascii_lowercase + string.digits, k=8))
        folder = path.parent / f".{path.name[:40]}.{word}{_SUFFIX}"
        if not os.path.lexists(folder):
            return folder


def _made(folder: Path) -> int | None:
    """Make a folder; the descriptor that keeps it locked. None: `clear_stale` of another writer came in between."""
    folder.mkdir(mode=0o700)
    return _locked(folder, new=True)


def _locked(folder: Path, new: bool = False) -> int | None:
    """A descriptor that holds the lock of a folder; None where another process has it, or the folder is gone.

    Where the file system knows no locks a `new` folder counts as locked, and is cleared by nobody.
    """
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except BlockingIOError:
        locked = False
    except OSError:
        locked = new
    with contextlib.suppress(FileNotFoundError):
        if locked and os.path.samestat(folder.stat(), os.fstat(held)):
            return held
    os.close(held)
    return None


def _put(folder: Path, path: Path, overwrite: bool) -> None:
    """Move what was written to its place."""
    new = folder / _NEW
    meanwhile = AdapterError(f"{shortened(path)!r} was written by another process meanwhile.\n  call again")
    try:
        if not overwrite:
            _put_where_free(new, path)
            return
        if path.is_dir() and new.is_file():
            raise AdapterError(f"{shortened(path)!r} is a folder: no file takes its place.\n  choose another path")
        if path.exists() and new.is_dir():  # a file takes a file's place in one step
            (folder / _OLD).mkdir()
            path.rename(folder / _OLD / path.name)
        new.rename(path)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR):
            raise
        raise meanwhile from None


def _put_where_free(new: Path, path: Path) -> None:
    """Move a file or a folder to a path where nothing is; EEXIST or ENOTEMPTY where another writer came first.

    A folder takes no other's place unless that is empty; a file would, so that it is linked, which fails instead.
    """
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    if new.is_file():
        try:
            os.link(new, path)
            return
        except OSError as e:
            if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):  # a file system without links
                raise
    new.rename(path)


def _put_back(folder: Path) -> None:
    """Put back what was moved away, where nothing took its place."""
    with contextlib.suppress(OSError):
        for old in (folder / _OLD).iterdir():
            if (folder / _NEW).exists() and not os.path.lexists(folder.parent / old.name):
                old.rename(folder.parent / old.name)
