"""Digests of a folder's files: damage is noticed before any library reads the damaged file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lorax_kit.errors import AdapterError
from lorax_kit.json_text import read_json

SEAL = "digests.json"


def seal(folder: Path) -> None:
    """Write the SHA-256 of every file of `folder` into it."""
    (folder / SEAL).write_text(json.dumps(_digests(folder), indent=1))


def check_seal(folder: Path) -> None:
    """Raise `AdapterError` unless every sealed file is there, byte for byte."""
    try:
        expected = read_json(folder / SEAL)
        assert isinstance(expected, dict)
    except (OSError, ValueError, AssertionError):
        raise damaged(folder, f"{SEAL} is missing or not readable") from None
    actual = _digests(folder)
    for name, digest in expected.items():
        if name not in actual:
            raise damaged(folder, f"the file {name} is missing")
        if actual[name] != digest:
            raise damaged(folder, f"the file {name} is not as it was written")


def sealed_files(folder: Path) -> set[str]:
    """What an adapter's folder may hold, for `refuse_existing`: what it was sealed with, or any of its parts."""
    try:
        return {SEAL, *map(str, read_json(folder / SEAL))}
    except (OSError, ValueError, TypeError):
        return {SEAL, "_CHECKPOINT_METADATA", "commit_success.txt", "factors/", "spec/"}


def damaged(folder: Path, reason: str) -> AdapterError:
    """The error for an adapter that cannot be used as it is."""
    return AdapterError(f"the adapter at {str(folder)!r} is damaged: {reason}.\n  restore it from a copy")


def _digests(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != SEAL)
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
