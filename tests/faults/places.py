"""Places where writing fails: a small disk, a read-only one, a folder of somebody else's, a limit on file sizes."""

import contextlib
import os
import resource
import subprocess
import tempfile
from pathlib import Path

import pytest

NOBODY = 65534


def _mount(*options):
    return subprocess.run(["mount", *map(str, options)], capture_output=True, text=True)


@contextlib.contextmanager
def small_disk(kib):
    """A file system of so many KiB; skips where none may be mounted."""
    folder = Path(tempfile.mkdtemp(prefix="lorax_disk_"))
    try:
        found = _mount("-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if found.returncode:
        folder.rmdir()
        pytest.skip(f"no file system may be mounted here: {found.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


@contextlib.contextmanager
def left(folder, kib):
    """So much room left on a disk."""
    free = os.statvfs(folder)
    filler = folder / "filler"
    filler.write_bytes(bytes(max(free.f_bavail * free.f_frsize - 1024 * kib, 0)))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only(folder):
    """A mounted file system that may not be written to."""
    assert _mount("-o", "remount,ro", folder).returncode == 0
    try:
        yield
    finally:
        assert _mount("-o", "remount,rw", folder).returncode == 0


@contextlib.contextmanager
def forbidden(folder):
    """A folder that this process may read and not write; root becomes nobody for the while."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@contextlib.contextmanager
def file_limit(size):
    """No file may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
