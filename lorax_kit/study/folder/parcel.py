"""What the trials of a group came to, as plain data: from the folder of a worker to that of the study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorax_kit.files.staging import staged
from lorax_kit.study.folder.store import RunStore


class Parcel(NamedTuple):
    """Rows and files of some trials.

    Attributes:
      facts: of their group, as in `study.json`; None where it recorded none.
      rows, curves, spectra: of the files of these names.
      adapters: trial -> path in its folder -> bytes.
    """

    facts: dict[str, Any] | None
    rows: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    spectra: list[dict[str, Any]]
    adapters: dict[str, dict[str, bytes]]


def packed(store: RunStore, trials: Sequence[str]) -> Parcel:
    """What a folder holds of these trials, all of them finished."""
    groups = [one for one in store.info.get("groups", ()) if list(one["names"]) == list(trials)]
    lines = {
        name: [row for row in store.rows(f"{name}.jsonl") if row["trial"] in trials] for name in ("curves", "spectra")
    }
    folders = {trial: store.adapter_path(trial) for trial in trials}
    return Parcel(
        groups[-1] if groups else None,
        [store.finished[trial] for trial in trials],
        lines["curves"],
        lines["spectra"],
        {trial: _files(folder) for trial, folder in folders.items() if folder.exists()},
    )


def _files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files of an adapter; the folder appears whole, in place of one of its name."""
    with staged(folder, overwrite=True) as made:
        for name, data in files.items():
            file = made / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
