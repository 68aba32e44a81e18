"""Compares many ways of making one model smaller, row by row, into a folder that a later call goes on with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from inspect import signature
from pathlib import Path
from typing import IO, Any

import jax
from tqdm import tqdm

from lorax_kit.checkpoint.fingerprint import fingerprint
from lorax_kit.commands.compress.compression import check_settings, compress_subject
from lorax_kit.commands.compress.methods import TUNED, Method, statistics_for
from lorax_kit.commands.compress.subjects import Subject
from lorax_kit.compress import ALLOCATIONS
from lorax_kit.compress.arguments import check_count, check_word
from lorax_kit.core.specs.setting import shown
from lorax_kit.errors import CompressError
from lorax_kit.files.lines import append, cut_to_lines
from lorax_kit.files.staging import clear_stale, refuse_existing, replace_file, sole_writer
from lorax_kit.files.writing import writing
from lorax_kit.json_text import first_difference, read_json, sealed_json
from lorax_kit.report.compression import read_rows
from lorax_kit.report.run_folder import RunFolderError
from lorax_kit.version import __version__

METHODS = (
    *("svd", "fisher", "asvd", "whitened", "whitened+int8", "whitened+residual-nf4"),
    *("magnitude", "wanda", "wanda-2:4", "int8", "int4", "nf4", "student"),
)
WITHOUT_SHARE = ("int8", "int4", "nf4", "magnitude-2:4", "wanda-2:4", TUNED)
"""Methods whose share of the parameters is not a choice."""
SETTINGS = {name: signature(compress_subject).parameters[name].default
            for name in ("lr", "rank", "share", "allocation", "rounds")}  # fmt: skip
"""Of `compress_subject`, with their defaults: a folder's rows all have the same."""


class RowFailed(CompressError):
    """A method could not make its row; those before it are in the folder."""


def compare(
    subject: Subject,
    out: str | Path,
    *,
    methods: Sequence[str] = METHODS,
    keeps: Sequence[float] = (0.5,),
    seeds: Sequence[int] = (0,),
    heal: Sequence[str] = ("whitened", "student"),
    batches: int = 16,
    steps: int = 0,
    progress: bool = True,
    command: str = "",
    **settings: Any,
) -> list[dict[str, Any]]:
    """A row for each method, share and (where it is healed) seed; `lorax_kit.report.write_comparison` draws them.

    Where something is healed, "original_tuned" stands beside it: the original, trained by the same loss, optimiser and
    rate on the same batches in the same order. Set beside an original that was never tuned, healing would be credited
    with what any training on these data gives.

    Args:
      out: folder of `rows.jsonl` and `comparison.json`; a row that is there is not measured again.
      keeps: shares of the parameters; 2:4 pruning and quantisation have one of their own.
      seeds: of healing.
      heal: which methods are healed, if there are `steps`.
      batches: of calibration.
      settings: more of `compress_subject`'s: lr, rank, share, allocation, rounds.

    Raises:
      CompressError: an unknown method, a folder of other settings.
      RowFailed: what a method raises.
    """
    settings = _complete(settings)
    allocation = settings["allocation"]
    check_count("batches", batches)
    if not (methods and keeps and seeds):
        raise CompressError("methods, keeps and seeds must each hold something.")
    ways, heal = _ways(methods, heal, check_count("steps", steps, 0))
    about = {
        "subject": subject.name,
        "params": fingerprint(subject.params),
        "targets": list(subject.targets),
        "batches": batches,
        "steps": steps,
        **settings,
    }
    wanted = dict.fromkeys(
        (way, keep, seed, way.name in heal)
        for way in ways
        for keep in ((0.5 if "2:4" in way.name else 1.0,) if way.name in WITHOUT_SHARE else keeps)
        for seed in (seeds if way.name in heal else seeds[:1])
    )
    checked = {name: value for name, value in settings.items() if name != "allocation"}
    for way, keep, seed, healed in wanted:
        check_settings(way, keep=keep, seed=seed, steps=steps if healed else 0, **checked)
    with closing(_Folder(Path(out), about, command)) as folder:
        done = {(row["method"], row["keep"], row["seed"], row["metric_healed"] is not None) for row in folder.rows}
        todo = [one for one in wanted if (one[0].name, *one[1:]) not in done]
        left = [way for way, _, _, _ in todo]
        stats = statistics_for(subject, left, batches, allocation=allocation, progress=progress)
        original = subject.quality(subject.apply, subject.params) if todo else None
        count = len(folder.rows) + len(todo)
        bar = tqdm(
            todo, desc="methods", unit="row", total=count, initial=len(folder.rows), disable=None if progress else True
        )
        for way, keep, seed, healed in bar:
            bar.set_postfix_str(f"{way.name} {keep:g}, seed {seed}")
            try:
                row, _ = compress_subject(
                    subject, method=way.name, keep=keep, steps=steps if healed else 0, seed=seed, batches=batches,
                    stats=stats, original=original, progress=progress, **settings,
                )  # fmt: skip
            except CompressError as e:
                raise RowFailed(f"{way.name}, {keep:g} kept: {e}") from e
            folder.add(row)
        return folder.rows


def _complete(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of `compress_subject`, with the defaults of those that are not given.

    Raises:
      CompressError: an unknown setting, or allocation.
    """
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise CompressError(f"{unknown[0]!r} is no setting of a comparison; known: {', '.join(sorted(SETTINGS))}.")
    settings = SETTINGS | settings
    check_word("allocation", settings["allocation"], ALLOCATIONS)
    return settings


def _ways(methods: Sequence[str], heal: Sequence[str], steps: int) -> tuple[list[Method], Sequence[str]]:
    """The methods to compare, and the names of those that are healed; the original that is tuned among both.

    Raises:
      CompressError: an unknown method; steps of healing, and none to heal.
    """
    ways = [Method.parse(name) for name in methods]
    for name in heal:
        Method.parse(name)
    if not steps:
        return ways, ()
    if not set(heal) & {way.name for way in ways}:
        raise CompressError(
            f"steps is {steps}, and none of the methods is healed.\n  leave it out, or name one in heal"
        )
    if TUNED not in methods:
        ways.append(Method.parse(TUNED))
    return ways, (*heal, TUNED)


class _Folder:
    """Rows on disk, of one model and one set of settings, written by one process.

    Nothing is written before the first row: a call that fails leaves no folder.

    Raises:
      CompressError: the folder holds other settings, is damaged, or is being written to.
      AdapterError: it cannot be made.
    """

    def __init__(self, path: Path, about: dict[str, Any], command: str) -> None:
        self.path, self.about, self.command = path, about, command
        self._held: IO[str] | None = None
        self.rows: list[dict[str, Any]] = []
        self.head, self.file = path / "comparison.json", path / "rows.jsonl"
        if self.head.exists():
            self._lock()
            try:
                self._read()
            except CompressError:
                self.close()
                raise
        elif not path.exists():
            refuse_existing(path, None, None)  # a place where no folder can be made
        elif self.file.exists():
            raise CompressError(f"{str(path)!r} has rows of unknown settings: its comparison.json is gone.")

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; the first makes the folder."""
        if self._held is None:
            with writing(self.path, CompressError):
                self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            if self.head.exists():
                raise CompressError(f"another process began {str(self.path)!r} meanwhile.\n  call again to go on")
            versions = {"jax": jax.__version__, "lorax_kit": __version__, "device": jax.devices()[0].device_kind}
            text = sealed_json({**self.about, "command": self.command, **versions}, indent=2) + "\n"
            replace_file(self.head, text.encode())
        self.rows.append(row)
        append(self.file, sealed_json(row) + "\n", CompressError)

    def _lock(self) -> None:
        self._held = sole_writer(self.path, CompressError)

    def close(self) -> None:
        """Let other processes write."""
        if self._held is not None:
            self._held.close()

    def _read(self) -> None:
        try:
            text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
            if "\n" in text:
                self.rows, head = read_rows(self.path)
            else:
                head = read_json(self.head)
        except (RunFolderError, ValueError) as e:
            raise CompressError(f"{str(self.path)!r} cannot be gone on with: {e}.\n  choose another folder") from None
        head = head if isinstance(head, dict) else {}
        theirs = {key: head.get(key, "unknown") for key in self.about}
        if theirs != self.about:
            key, was, now = first_difference(theirs, self.about)
            raise CompressError(
                f"{str(self.path)!r} holds a comparison with {key} {shown(was)}, not {shown(now)}.\n"
                "  choose another folder, or the same settings"
            )
        clear_stale(self.path)
        cut_to_lines(self.file)
