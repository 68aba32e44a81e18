"""The run folder of a study: written as trials finish, readable whatever interrupts it, resumed from as it is.

study.json     what was asked, where it ran, what it cost          replaced atomically
trials.jsonl   one line per finished trial                         appended, synced
curves.jsonl   losses by step, validations                         appended
spectra.jsonl  singular values of each site's delta                appended
adapters/      one folder per trial                                each appears whole
training.npz   the group under way at its last save                replaced atomically, gone at its end
rungs/         with early stopping, where each group stands        gone at the end

`lorax-kit analyse` adds overlaps.jsonl, intruders.jsonl and forgetting.jsonl.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kit.checkpoint.fingerprint import differences, first_difference
from lorax_kit.core.specs.setting import shown
from lorax_kit.errors import StudyError
from lorax_kit.extras import installed
from lorax_kit.files.lines import append, cut_to_lines, whole_lines
from lorax_kit.files.staging import clear_stale, is_begun, replace_file, sole_writer, staged
from lorax_kit.files.writing import writing
from lorax_kit.json_text import parse_json, read_json, sealed_json
from lorax_kit.study.programs.progress import Progress
from lorax_kit.version import __version__

TRAINING = "training.npz"
RUNGS = "rungs"
JSONL = ("trials.jsonl", "curves.jsonl", "spectra.jsonl")
RECORDS = ("groups", "stacks", "metrics")
FORMS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("trials", *RECORDS), (list, "a list")),
    **dict.fromkeys(("design", "spec", "environment", "task", "targets", "baseline", "leaves"), (dict, "an object")),
    "compiles": (int, "a whole number"),
    "seconds": ((int, float), "a number"),
}
"""What `study.json` holds, as far as it is read again; `RECORDS` are lists of objects."""
ANALYSIS = ("overlaps.jsonl", "intruders.jsonl", "forgetting.jsonl")


PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def environment() -> dict[str, Any]:
    """What a reader needs to know of the machine and the versions."""
    return {
        "lorax_kit": __version__,
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := installed(name)) is not None},
        "platform": platform.platform(terse=True),
        "backend": jax.default_backend(),
        "devices": [d.device_kind for d in jax.devices()],
        "cores": os.cpu_count(),
        "x64": jax.config.jax_enable_x64,  # type: ignore[attr-defined]
    }


def _without_empty(design: Mapping[str, Any]) -> dict[str, Any]:
    """A design in which an empty object counts as none: the settings of a builder that was called without any."""
    return {name: None if value == {} else value for name, value in design.items()}


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The keys that differ, with both values where they are short."""
    words = []
    for key, value in sorted(ours.items()):
        both = [json.dumps(theirs.get(key)), json.dumps(value)]
        short = key not in ("base", "data") and max(map(len, both)) <= 40
        words.append(f"{key}: {both[0]} there, {both[1]} here" if short else key)
    return ", ".join(words)


def plain(x: Any) -> Any:
    """NaN and infinities as null: they are not JSON."""
    if isinstance(x, float) and not math.isfinite(x):
        return None
    if isinstance(x, Mapping):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [plain(v) for v in x]
    return x


def misshapen(document: Mapping[str, Any]) -> str | None:
    """What of a `study.json` is of another kind than is written; null is none of it."""
    for name, (kind, words) in FORMS.items():
        value = document.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            return f"{name!r} is {shown(value)}, and must be {words}"
    for name in RECORDS:
        if not all(isinstance(record, dict) for record in document.get(name) or ()):
            return f"{name!r} must hold objects alone"
    return None


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSONL file about trials, none where there is no file.

    Raises:
      StudyError: a line is damaged.
    """
    if not file.exists():
        return []
    rows, number = [], 0
    try:
        text = file.read_bytes()
    except OSError as e:
        raise StudyError(f"{str(file)!r} cannot be read: {e.strerror}.") from None
    try:
        for number, line in enumerate(whole_lines(text), 1):  # noqa: B007  (the error names it)
            row = parse_json(line)
            rows.append(row | {"trial": str(row["trial"])})
    except (ValueError, TypeError, KeyError) as e:
        what = f"lacks {e}" if isinstance(e, KeyError) else e
        raise StudyError(
            f"{str(file)!r}, line {number} is not the JSON of a trial: {what}.\n"
            "  delete that line: the trial is then run again"
        ) from None
    return rows


def finished_trials(path: str | Path) -> tuple[str, ...]:
    """Names of the trials that a run folder has rows of; none if there is no folder.

    Raises:
      StudyError: a line of its results is damaged.
    """
    return tuple(row["trial"] for row in rows_of(Path(path) / "trials.jsonl"))


class RunStore:
    """A run folder. Opening it only reads: nothing on disk changes before `create`.

    Args:
      path: the folder.
      design: what identifies the study: a folder holding another one is an error.
      overwrite: let `create` discard what the folder holds.
      leaves: `lorax_kit.checkpoint.fingerprint.digests` of the base, to say in what another one differs.

    Raises:
      StudyError: the folder holds something else, or another study.
    """

    def __init__(
        self,
        path: str | Path,
        design: Mapping[str, Any],
        *,
        overwrite: bool = False,
        leaves: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        design = _without_empty(json.loads(json.dumps(design)))
        self._read = self._stamps()
        if self.path.exists() and not self.path.is_dir():
            raise StudyError(f"{str(self.path)!r} is a file.\n  choose another folder")
        previous = self._previous()
        if previous is not None and not isinstance(previous.get("identity"), Mapping):
            previous = None  # somebody else's study.json
        if previous is None and self.path.exists() and not is_begun(self.path):
            raise StudyError(f"{str(self.path)!r} is not empty and holds no study.\n  choose another folder")
        self._discard = overwrite and previous is not None
        theirs = _without_empty(previous["identity"]) if previous is not None else design
        if not overwrite and previous is not None and theirs != design:
            ours = {k: v for k, v in design.items() if theirs.get(k) != v}
            changed = differences(leaves or {}, previous["leaves"]) if isinstance(previous.get("leaves"), dict) else {}
            raise StudyError(
                f"{str(self.path)!r} holds another study (it differs in {_differing(ours, theirs) or 'its keys'}).\n"
                + (f"  {first_difference(changed)}\n" if "base" in ours and changed else "")
                + "  choose another folder, or discard it: overwrite=True"
            )
        self._lock: IO[str] | None = None
        self.identity = design
        self.info: dict[str, Any] = {} if overwrite else previous or {}
        self.finished = {} if overwrite else {row["trial"]: row for row in self.rows("trials.jsonl")}
        self.curves = Counter(() if overwrite else (row["trial"] for row in self.rows("curves.jsonl")))

    def create(self) -> None:
        """Make the folder; discard what was to be overwritten, and half a line that an interruption left.

        Raises:
          StudyError: another process is writing to it, or wrote to it since this one read it.
        """
        with writing(self.path, StudyError):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = sole_writer(self.path, StudyError)
            if self._stamps() != self._read:
                self.close()
                raise StudyError(f"another process wrote to {str(self.path)!r} meanwhile.\n  call again")
            if self._discard:
                for name in ("study.json", *JSONL, *ANALYSIS, TRAINING, "results.csv", "report.html"):
                    (self.path / name).unlink(missing_ok=True)
                for name in ("adapters", "plots", "tables", RUNGS):
                    shutil.rmtree(self.path / name, ignore_errors=True)
            with writing(self.path / "adapters", StudyError):
                (self.path / "adapters").mkdir(exist_ok=True)
            clear_stale(self.path)
            clear_stale(self.path / "adapters")
            for name in JSONL:
                cut_to_lines(self.path / name)

    def close(self) -> None:
        """Let other processes write."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _stamps(self) -> list[tuple[int, ...] | None]:
        """What tells whether the files that `run` goes on from are those that were read."""
        stamps: list[tuple[int, ...] | None] = []
        for name in ("study.json", *JSONL):
            try:
                found = (self.path / name).stat()
                stamps.append((found.st_ino, found.st_size, found.st_mtime_ns))
            except OSError:
                stamps.append(None)
        return stamps

    def _previous(self) -> dict[str, Any] | None:
        file = self.path / "study.json"
        if not file.exists():
            return None
        try:
            document = read_json(file)
        except (ValueError, OSError) as e:
            raise StudyError(f"{str(file)!r} is not JSON: {e}.\n  restore it, or discard the folder") from None
        if not isinstance(document, dict):
            return {}
        if "identity" in document and (wrong := misshapen(document)):
            raise StudyError(f"{str(file)!r} is damaged: {wrong}.\n  restore it, or discard the folder")
        return document

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Whole lines of a JSONL file: one cut off by an interruption does not count."""
        return rows_of(self.path / name)

    def write_info(self, **values: Any) -> None:
        """Update `study.json`, replaced in one step."""
        self.info = {**self.info, "identity": self.identity, **plain(values)}
        replace_file(self.path / "study.json", sealed_json(self.info, indent=2).encode())

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a JSONL file and make sure they are on disk."""
        text = "".join(sealed_json(plain(row)) + "\n" for row in rows)
        append(self.path / name, text, StudyError)

    def finish_trial(self, row: Mapping[str, Any]) -> None:
        """A trial's row: from here on it is finished."""
        self.append("trials.jsonl", [row])
        self.finished[row["trial"]] = dict(row)

    def save_progress(self, trials: Sequence[str], progress: Progress, place: str | None = None) -> None:
        """Keep the training under way of a group of trials, or with a `place` where it stands at a rung."""
        file = self._progress_file(place)
        facts = {"trials": list(trials), "evaluations": progress.evaluations, "seconds": progress.seconds}
        facts["dtypes"] = [str(x.dtype) for x in progress.running]
        # As bytes: the format knows no bfloat16.
        raw = (np.ascontiguousarray(x).view(np.uint8) for x in progress.running)
        arrays: dict[str, Any] = {f"running_{i}": x for i, x in enumerate(raw)}
        arrays |= {"facts": np.array(sealed_json(facts)), "losses": progress.losses, "failed": progress.failed}
        with staged(file, overwrite=True) as new, open(new, "wb") as opened:
            np.savez(opened, **arrays)

    def _progress_file(self, place: str | None) -> Path:
        return self.path / TRAINING if place is None else self.path / RUNGS / f"{place}.npz"

    def drop_rungs(self) -> None:
        """Every trial has its row."""
        shutil.rmtree(self.path / RUNGS, ignore_errors=True)

    def load_progress(self, trials: Sequence[str], size: int, place: str | None = None) -> Progress | None:
        """The training under way of these trials in a pack of `size`, if that is what was interrupted.

        Raises:
          StudyError: the file is damaged.
        """
        file = self._progress_file(place)
        if not file.exists():
            return None
        try:
            with np.load(file, allow_pickle=False) as stored:
                facts = parse_json(str(stored["facts"]))
                if facts["trials"] != list(trials) or len(stored["failed"]) != size:
                    return None
                dtypes = enumerate(facts["dtypes"])
                running = [stored[f"running_{i}"].view(jnp.dtype(name)) for i, name in dtypes]
                evaluations = [(int(step), metrics) for step, metrics in facts["evaluations"]]
                return Progress(running, stored["losses"], stored["failed"], evaluations, float(facts["seconds"]))
        except Exception as e:  # zipfile and numpy raise many kinds
            raise StudyError(
                f"{str(file)!r} is damaged: {e}.\n  delete it: the group under way is then trained from its start"
            ) from None

    def drop_progress(self) -> None:
        """The group under way is finished."""
        (self.path / TRAINING).unlink(missing_ok=True)

    def adapter_path(self, trial: str) -> Path:
        """Where a trial's adapter goes."""
        return self.path / "adapters" / trial
