"""Reads and checks the files of a run folder, and replaces files in it atomically.

A run folder holds `study.json` (what was asked, where and when it ran), `trials.jsonl` (one object per trial
that ended), `curves.jsonl` (losses by step), `spectra.jsonl` (singular values by site), and what `lorax-kit analyse`
adds: `overlaps.jsonl` (of the subspaces of two trials by site), `intruders.jsonl` and `forgetting.jsonl`. All but the
first two may be absent. A run that was killed may leave half a line at the end of a file: it is left out and noted.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax_kit.files.lines import whole_lines
from lorax_kit.json_text import parse_json, read_json
from lorax_kit.study.folder.store import misshapen

Record = dict[str, Any]

REQUIRED = {
    "trials.jsonl": ("trial", "rank", "lr", "seed", "status"),
    "curves.jsonl": ("trial", "step"),
    "spectra.jsonl": ("trial", "site", "singular_values"),
    "overlaps.jsonl": ("site", "rank_i", "rank_j", "trial_i", "trial_j", "phi"),
    "intruders.jsonl": ("trial", "site", "top", "epsilon", "adapter", "random", "spread"),
    "forgetting.jsonl": ("trial", "problem", "metric", "before", "after", "adapted", "of"),
}
OPTIONAL_TRIAL_KEYS: Record = {"alpha": None, "targets": "", "variant": ""}
NUMBERS = ("rank", "lr", "step")
COSTS = ("alpha", "params", "adapter_bytes", "train_seconds")
SCORES = ("loss", "effective_rank")
ANALYSED = {
    "intruders.jsonl": ("top", "epsilon", "adapter", "random", "spread"),
    "forgetting.jsonl": ("before", "after"),
}
"""Numbers of the files that an analysis adds."""
PARTS = ("train_", "val_", "test_")
"""What the columns of losses and metrics begin with."""


class RunFolderError(ValueError):
    """The folder is not a run folder, or one of its files cannot be read."""


@dataclass(frozen=True)
class RunFolder:
    """What a run left on disk.

    Attributes:
      path: The folder.
      study: `study.json` as it stands.
      trials: One record per finished or diverged trial, the probe's first, then by targets,
        variant, rank, alpha, lr and seed.
      curves: Records {"trial", "step", and "loss" and/or "val_loss", "val_accuracy"} in order of step.
      spectra: Records {"trial", "site", "rank", "singular_values", "effective_rank", "rank90"}.
      overlaps: Records {"site", "rank_i", "rank_j", "trial_i", "trial_j", "phi"}: phi[i - 1][j - 1] of the i leading
        directions of the first trial's delta and the j leading ones of the second's.
      intruders: Records {"trial", "site", "top", "epsilon", "adapter", "random", "spread"}: counts.
      forgetting: Records {"trial", "problem", "metric", "before", "after", "adapted", "of"}.
      notes: Sentences about what was tolerated while reading, for the reader of the report.
    """

    path: Path
    study: Record
    trials: tuple[Record, ...]
    curves: tuple[Record, ...]
    spectra: tuple[Record, ...]
    overlaps: tuple[Record, ...]
    intruders: tuple[Record, ...]
    forgetting: tuple[Record, ...]
    notes: tuple[str, ...]

    @property
    def planned(self) -> int:
        """Number of trials the design asked for, as `study.json` lists them before the first one starts."""
        return max(len(self.trials), len(self.study.get("trials") or ()))

    @property
    def finished(self) -> bool:
        """True when the study recorded its end and every planned trial is there."""
        return bool(self.study.get("finished")) and len(self.trials) == self.planned


def read_run(run_dir: str | os.PathLike[str]) -> RunFolder:
    """Read a run folder.

    If a trial is recorded twice (a resumed run), the later record counts.

    Args:
      run_dir: Folder with at least `study.json` and one trial in `trials.jsonl`.

    Raises:
      RunFolderError: The folder or a required file is missing, no trial has ended yet, or a line other than
        a half-written last one is malformed; the message names the file and the line.

    Example:
      >>> run = read_run("runs/demo")  # doctest: +SKIP
      >>> len(run.trials), run.planned  # doctest: +SKIP
      (18, 18)
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise RunFolderError(
            f"'{path}' is not a run folder: no such folder.\n"
            "  next: pass the folder a study wrote (its --out), the one that holds study.json."
        )
    notes: list[str] = []
    study = _study(path / "study.json")
    trials = _lines(path / "trials.jsonl", notes)
    if not trials:
        raise RunFolderError(
            f"'{path}' has no finished trial: {_missing_or_empty(path / 'trials.jsonl')}.\n"
            "  next: wait for the first trial to end, or look at the study's own output for why none did."
        )
    latest = {record["trial"]: OPTIONAL_TRIAL_KEYS | record for record in trials}
    if len(latest) < len(trials):
        notes.append(
            f"Trials recorded more than once (a resumed run): {len(trials) - len(latest)} earlier records are "
            "superseded by the later one."
        )
    curves: dict[tuple[str, int], Record] = {}
    for record in _lines(path / "curves.jsonl", notes):
        curves.setdefault((record["trial"], record["step"]), {}).update(record)
    spectra = {(record["trial"], record["site"]): record for record in _lines(path / "spectra.jsonl", notes)}
    if not notes:  # else one of them tells of the cut
        notes += _cut_short(latest.values(), curves, spectra)
    return RunFolder(
        path=path,
        study=study,
        trials=tuple(sorted(latest.values(), key=_trial_order)),
        curves=tuple(sorted(curves.values(), key=lambda record: record["step"])),
        spectra=tuple(spectra.values()),
        overlaps=tuple(_lines(path / "overlaps.jsonl", notes)),
        intruders=tuple(_lines(path / "intruders.jsonl", notes)),
        forgetting=tuple(_lines(path / "forgetting.jsonl", notes)),
        notes=tuple(notes),
    )


def _cut_short(trials: Iterable[Record], curves: Collection[Any], spectra: Collection[Any]) -> list[str]:
    """Notes of files that end before the last rows of trials that are done; a folder without such a file is whole."""
    done = [record for record in trials if record["status"] == "done"]
    with_spectra = {trial for trial, _ in spectra}
    lacking = {
        "curves.jsonl": [t for t in done if curves and "steps" in t and (t["trial"], t["steps"]) not in curves],
        "spectra.jsonl": [t for t in done if spectra and t["rank"] and t["trial"] not in with_spectra],
    }
    return [
        f"{name} lacks the last rows of {len(odd)} finished trials, {odd[0]['trial']} among them: it was cut short."
        for name, odd in lacking.items()
        if odd
    ]


def _trial_order(record: Record) -> tuple[Any, ...]:
    return (
        record["rank"] > 0,
        str(record["targets"]),
        str(record["variant"]),
        record["rank"],
        record["alpha"] or 0,
        record["lr"],
        str(record["seed"]).zfill(12),
    )


def _missing_or_empty(file: Path) -> str:
    return f"{file.name} {'holds no complete line' if file.exists() else 'does not exist'}"


def _study(file: Path) -> Record:
    if not file.exists():
        trained = "; it holds one training, of `lorax-kit train`" if (file.parent / "metrics.jsonl").exists() else ""
        raise RunFolderError(
            f"'{file.parent}' is not a run folder: it has no study.json{trained}.\n"
            "  next: pass the folder a study wrote (its --out)."
        )
    try:
        study = read_json(file)
    except ValueError as error:
        raise RunFolderError(f"'{file}' is not valid JSON: {error}.") from None
    if not isinstance(study, dict):
        raise RunFolderError(f"'{file}' holds a {type(study).__name__}, expected an object.")
    if wrong := misshapen(study):
        raise RunFolderError(f"'{file}' is damaged: {wrong}.")
    return study


def _lines(file: Path, notes: list[str]) -> list[Record]:
    if not file.exists():
        return []
    content, records, number = file.read_bytes(), [], 0
    try:
        for number, line in enumerate(whole_lines(content), start=1):  # noqa: B007  (the error names it)
            if line.strip():
                records.append(_record(file.name, line))
    except ValueError as error:
        raise RunFolderError(
            f"'{file}', line {number}: {error}\n"
            "  next: mend or delete that line; a study resumed from this folder redoes a missing trial."
        ) from None
    if content and not content.endswith(b"\n"):  # the writer was stopped inside this line
        notes.append(f"The last line of {file.name} was cut off by an interruption and is left out.")
    return records


def _record(name: str, line: bytes) -> Record:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error}).") from None
    if not isinstance(record, dict):
        raise ValueError(f"holds a {type(record).__name__}, expected an object.")
    missing = [key for key in REQUIRED[name] if key not in record]
    if missing:
        raise ValueError(f"lacks {', '.join(map(repr, missing))} (has {', '.join(record) or 'nothing'}).")
    if name == "overlaps.jsonl" and not _is_grid(record["phi"]):
        raise ValueError("'phi' is no grid of numbers: lists of one length, of numbers or null.")
    measured = [key for key in ANALYSED.get(name, ()) if key in record]
    measured += [key for key in record if key.startswith(PARTS) and key != "train_seconds"]
    for key in (*NUMBERS, *COSTS, *SCORES, *measured):
        value = record.get(key, 0)
        if value is None and key not in NUMBERS:  # a trial that diverged has none
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key!r} is {value!r}, expected a number.")
    return record


def _is_grid(rows: Any) -> bool:
    """Whether it is a list of equal, not empty lists of numbers or null."""
    if not (isinstance(rows, list) and rows and all(isinstance(row, list) and row for row in rows)):
        return False
    numbers = all(x is None or (isinstance(x, int | float) and not isinstance(x, bool)) for row in rows for x in row)
    return numbers and len({len(row) for row in rows}) == 1
