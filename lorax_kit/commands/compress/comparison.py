"""Compares many ways of making one model smaller, row by row, into a folder that a later call goes on with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import jax
from tqdm import tqdm

from lorax_kit.checkpoint.fingerprint import fingerprint
from lorax_kit.commands.compress.compression import compress_subject
from lorax_kit.commands.compress.methods import statistics_for
from lorax_kit.commands.compress.recipe import TUNED, Healing, Method, Recipe
from lorax_kit.commands.compress.subjects import Subject
from lorax_kit.compress.arguments import check_count
from lorax_kit.core.specs.setting import shown
from lorax_kit.errors import CompressError
from lorax_kit.files.lines import append, cut_to_lines
from lorax_kit.files.staging import clear_stale, refuse_existing, replace_file, sole_writer
from lorax_kit.files.writing import writing
from lorax_kit.json_text import first_difference, read_json, sealed_json
from lorax_kit.report.pages.compression import read_rows
from lorax_kit.report.run_folder import RunFolderError
from lorax_kit.version import __version__

METHODS = (
    *("svd", "fisher", "asvd", "whitened", "whitened+int8", "whitened+residual-nf4"),
    *("magnitude", "wanda", "wanda-2:4", "int8", "int4", "nf4", "student"),
)


class RowFailed(CompressError):
    """A method could not make its row; those before it are in the folder."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared: every method at every share, those that are healed with every seed.

    Where something is healed, "original_tuned" stands beside it: the original, trained by the same loss, optimiser and
    rate on the same batches in the same order. Set beside an original that was never tuned, healing would be credited
    with what any training on these data gives.

    Args:
      methods: as `Recipe` has them.
      keeps: shares of the parameters; 2:4 pruning and what leaves nothing out have one of their own.
      allocation, batches: of every recipe.
      heal: which methods are healed; of the default ones the best, and the student, which is nothing without.
      healing: of those, if it has steps; its seed is the first.
      seeds: how many seeds each is healed with.

    Raises:
      CompressError: nothing to compare, steps of healing and none to heal, what `Recipe` and `Healing` refuse.
    """

    methods: Sequence[str] = METHODS
    keeps: Sequence[float] = (0.5,)
    allocation: str = "loss"
    batches: int = 16
    heal: Sequence[str] = ("whitened", "student")
    healing: Healing = field(default_factory=Healing)
    seeds: int = 1

    def __post_init__(self) -> None:
        check_count("seeds", self.seeds)
        if not (self.methods and self.keeps):
            raise CompressError("methods and keeps must each hold something.")
        for name in self.heal:
            Method.parse(name)
        if self.healing.steps and not set(self.heal) & set(self.methods):
            raise CompressError(
                f"steps is {self.healing.steps}, and none of the methods is healed.\n"
                "  leave it out, or name one in heal"
            )
        for recipe, healing in self.rows():
            healing.check(recipe)

    def rows(self) -> list[tuple[Recipe, Healing]]:
        """Each row once, in the order in which they are measured."""
        healed = (*self.heal, TUNED) if self.healing.steps else ()
        rows: dict[tuple[Recipe, Healing], None] = {}
        for method in (*self.methods, *healed[-1:]):
            steps, seeds = (self.healing.steps, self.seeds) if method in healed else (0, 1)
            for keep in (0.5,) if "2:4" in method else self.keeps:
                recipe = Recipe(method=method, keep=keep, allocation=self.allocation, batches=self.batches)
                for i in range(seeds):
                    rows[recipe, replace(self.healing, steps=steps, seed=self.healing.seed + i)] = None
        return list(rows)


def compare(
    subject: Subject,
    out: str | Path,
    comparison: Comparison,
    *,
    rounds: int = 15,
    progress: bool = True,
    command: str = "",
) -> list[dict[str, Any]]:
    """A row for each method, share and (where it is healed) seed; `lorax_kit.report.pages.compression` draws them.

    Args:
      out: folder of `rows.jsonl` and `comparison.json`; a row that is there is not measured again.
      rounds: as `compress_subject` has them.
      command: what the folder says it was made by.

    Raises:
      CompressError: a folder of other settings.
      RowFailed: what a method raises.
    """
    settings = asdict(comparison.healing)
    del settings["seed"]
    about = {
        "subject": subject.name,
        "params": fingerprint(subject.params),
        "targets": list(subject.targets),
        "batches": comparison.batches,
        **settings,
        "allocation": comparison.allocation,
        "rounds": check_count("rounds", rounds, 0),
    }
    with closing(_Folder(Path(out), about, command)) as folder:
        done = {(row["method"], row["keep"], row["seed"], row["metric_healed"] is not None) for row in folder.rows}
        todo = [
            (recipe, healing)
            for recipe, healing in comparison.rows()
            if (recipe.method, recipe.keep, healing.seed, healing.steps > 0) not in done
        ]
        left = [recipe.way for recipe, _ in todo]
        stats = statistics_for(subject, left, comparison.batches, allocation=comparison.allocation, progress=progress)
        original = subject.quality(subject.apply, subject.params) if todo else None
        count = len(folder.rows) + len(todo)
        bar = tqdm(
            todo, desc="methods", unit="row", total=count, initial=len(folder.rows), disable=None if progress else True
        )
        for recipe, healing in bar:
            bar.set_postfix_str(f"{recipe.method} {recipe.keep:g}, seed {healing.seed}")
            try:
                row, _ = compress_subject(
                    subject, recipe, healing, rounds=rounds, stats=stats, original=original, progress=progress
                )
            except CompressError as e:
                raise RowFailed(f"{recipe.method}, {recipe.keep:g} kept: {e}") from e
            folder.add(row)
        return folder.rows


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
