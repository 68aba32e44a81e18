"""A run folder that several processes share: one writes, the others hold what it has read and written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorax_kit.checkpoint.agreed import told
from lorax_kit.errors import StudyError
from lorax_kit.processes import is_writer
from lorax_kit.study.folder.store import RunStore, plain
from lorax_kit.study.programs.progress import Progress


class SharedStore:
    """`RunStore` for every process of a program: reads are told to all, writes happen in one.

    Args:
      make: opens the folder; called by the writer alone. Where it raises, every process does.
    """

    def __init__(self, make: Callable[[], RunStore]) -> None:
        self._store: RunStore | None = None

        def read() -> tuple[Path, dict[str, Any], dict[str, Any], Any]:
            self._store = make()
            return self._store.path, self._store.info, self._store.finished, self._store.curves

        self.path, self.info, self.finished, self.curves = told(read, StudyError)

    def _write(self, method: str, /, *args: Any, **kwargs: Any) -> None:
        if is_writer():
            getattr(self._store, method)(*args, **kwargs)

    def create(self) -> None:
        """As `RunStore.create`; every process fails where it does."""
        told(lambda: self._write("create"), StudyError)

    def close(self) -> None:
        """As `RunStore.close`."""
        self._write("close")

    def write_info(self, **values: Any) -> None:
        """As `RunStore.write_info`."""
        self.info = {**self.info, **plain(values)}
        self._write("write_info", **values)

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """As `RunStore.append`."""
        self._write("append", name, rows)

    def finish_trial(self, row: Mapping[str, Any]) -> None:
        """As `RunStore.finish_trial`."""
        self.finished[row["trial"]] = dict(row)
        self._write("finish_trial", row)

    def save_progress(self, trials: Sequence[str], progress: Progress, place: str | None = None) -> None:
        """As `RunStore.save_progress`."""
        self._write("save_progress", trials, progress, place)

    def load_progress(self, trials: Sequence[str], size: int, place: str | None = None) -> Progress | None:
        """As `RunStore.load_progress`, in every process."""

        def load() -> Progress | None:
            assert self._store is not None
            return self._store.load_progress(trials, size, place)

        return told(load, StudyError)

    def drop_progress(self) -> None:
        """As `RunStore.drop_progress`."""
        self._write("drop_progress")

    def drop_rungs(self) -> None:
        """As `RunStore.drop_rungs`."""
        self._write("drop_rungs")

    def adapter_path(self, trial: str) -> Path:
        """As `RunStore.adapter_path`."""
        return self.path / "adapters" / trial
