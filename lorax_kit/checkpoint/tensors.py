"""Tensors in a safetensors file.

`models.pretrained` opens the same format by itself: neither folder may import the other (models know nothing
of adapters), and all that both would share is one call.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lorax_kit.errors import AdapterError

DIGEST = "lorax_sha256"
"""Key of the metadata: the SHA-256 of all else that the file holds. Files without it are read as well."""


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """Every tensor by name; a damaged file raises `AdapterError`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(file)
    except (KeyError, AttributeError) as e:  # a dtype that the library does not know, or numpy does not
        raise AdapterError(
            f"{str(file)!r} holds tensors of a dtype that numpy lacks: {e}.\n  save them in float32 or bfloat16"
        ) from None
    except (SafetensorError, ValueError) as e:
        raise _damaged(file, e) from None
    _check_digest(file, tensors)
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """What stands beside the tensors; a damaged file raises `AdapterError`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            return opened.metadata() or {}
    except SafetensorError as e:
        raise _damaged(file, e) from None


def write_tensors(file: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as torch's libraries expect them (they look for the format "pt"), and metadata beside them."""
    from safetensors.numpy import save_file

    # Copies of what is not contiguous: a transposed view would be written in the order it lies in memory.
    contiguous = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    beside = {"format": "pt", **(metadata or {})}
    save_file(contiguous, file, metadata=beside | {DIGEST: _digest(contiguous, beside)})
    _sort_metadata(file)
    file.chmod(0o644)  # safetensors makes private files; a model is there to be shared


def _sort_metadata(file: Path) -> None:
    """Write the metadata in order of their keys, where the library leaves it to chance: equal saves are equal files."""
    with open(file, "r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # blanks at the end, as the format has them
            opened.seek(8)
            opened.write(text.ljust(size))


def _check_digest(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Raise `AdapterError` where a file with a digest, under whatever name damage left it, is not as it was written."""
    beside = read_metadata(file)
    stored = {name: x for name, x in beside.items() if re.fullmatch("[0-9a-f]{64}", x)}
    rest = {name: x for name, x in beside.items() if name not in stored}
    if (DIGEST in beside and DIGEST not in stored) or (stored and stored != {DIGEST: _digest(tensors, rest)}):
        raise _damaged(file, "it is not as it was written")


def _digest(tensors: Mapping[str, np.ndarray], beside: Mapping[str, str]) -> str:
    hasher = hashlib.sha256(repr(sorted(beside.items())).encode())
    for name in sorted(tensors):
        x = tensors[name]
        hasher.update(repr((name, str(x.dtype), x.shape)).encode())
        hasher.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()


def _damaged(file: Path, reason: object) -> AdapterError:
    return AdapterError(f"{str(file)!r} is damaged: {reason}.\n  restore it from a copy")
