"""Tensors in a safetensors file.

`models.pretrained` opens the same format by itself: neither folder may import the other (models know nothing
of adapters), and all that both would share is one call.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lorax_kit.errors import AdapterError


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """Every tensor by name; a damaged file raises `AdapterError`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except (SafetensorError, KeyError) as e:  # KeyError: a dtype that numpy lacks
        raise AdapterError(f"{str(file)!r} is damaged: {e}.\n  restore it from a copy") from None


def read_metadata(file: Path) -> dict[str, str]:
    """What stands beside the tensors; a damaged file raises `AdapterError`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            return opened.metadata() or {}
    except SafetensorError as e:
        raise AdapterError(f"{str(file)!r} is damaged: {e}.\n  restore it from a copy") from None


def write_tensors(file: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as torch's libraries expect them (they look for the format "pt"), and metadata beside them."""
    from safetensors.numpy import save_file

    # Copies of what is not contiguous: a transposed view would be written in the order it lies in memory.
    contiguous = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    save_file(contiguous, file, metadata={"format": "pt", **(metadata or {})})
    file.chmod(0o644)  # safetensors makes private files; a model is there to be shared
