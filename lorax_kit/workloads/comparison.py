"""Compares many ways of making one model smaller, row by row, into a folder that a later call goes on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from lorax_kit.checkpoint.fingerprint import fingerprint
from lorax_kit.compress import ALLOCATIONS
from lorax_kit.compress.arguments import check_count, check_share, check_word
from lorax_kit.core.errors import CompressError
from lorax_kit.report.compression import read_rows
from lorax_kit.report.run_folder import RunFolderError
from lorax_kit.version import __version__
from lorax_kit.workloads.compression import compress_subject
from lorax_kit.workloads.methods import Method, statistics_for
from lorax_kit.workloads.subjects import Subject

METHODS = (
    *("svd", "fisher", "asvd", "whitened", "whitened+int8", "whitened+residual-nf4"),
    *("magnitude", "wanda", "wanda-2:4", "int8", "int4", "nf4", "student"),
)
WITHOUT_SHARE = ("int8", "int4", "nf4", "magnitude-2:4", "wanda-2:4")
"""Methods whose share of the parameters is not a choice."""
SETTINGS = {"lr", "rank", "share", "allocation", "rounds"}


def compare(
    subject: Subject,
    out: str | Path,
    *,
    methods: Sequence[str] = METHODS,
    keeps: Sequence[float] = (0.5,),
    seeds: Sequence[int] = (0,),
    heal: Sequence[str] = ("whitened", "student"),
    batches: int = 16,
    steps: int = 200,
    progress: bool = True,
    command: str = "",
    **settings: Any,
) -> list[dict[str, Any]]:
    """A row for each method, share and (where it is healed) seed; `lorax_kit.report.write_comparison` draws them.

    Args:
      out: folder of `rows.jsonl` and `comparison.json`; a row that is there is not measured again.
      keeps: shares of the parameters; 2:4 pruning and quantisation have one of their own.
      seeds: of healing.
      heal: which methods are healed, in `steps` steps.
      batches: of calibration.
      settings: more of `compress_subject`'s: lr, rank, share, allocation, rounds.

    Raises:
      CompressError: an unknown method, a folder of other settings, what a method raises.
    """
    if unknown := sorted(set(settings) - SETTINGS):
        raise CompressError(f"{unknown[0]!r} is no setting of a comparison; known: {', '.join(sorted(SETTINGS))}.")
    allocation = settings.get("allocation", "loss")
    check_word("allocation", allocation, ALLOCATIONS)
    check_count("batches", batches)
    check_count("steps", steps, 0)
    for keep in keeps:
        check_share("keep", keep)
    for seed in seeds:
        check_count("seed", seed, 0)
    if not (methods and keeps and seeds):
        raise CompressError("methods, keeps and seeds must each hold something.")
    ways = [Method.parse(name) for name in methods]
    for name in heal:
        if not Method.parse(name).healed:
            raise CompressError(f"{name!r} leaves nothing low-rank to heal.\n  heal svd, fisher, asvd or whitened")
    if not steps:
        heal = ()
    about = {
        "subject": subject.name,
        "params": fingerprint(subject.params),
        "targets": list(subject.targets),
        "batches": batches,
        "steps": steps,
        **{name: settings[name] for name in sorted(settings)},
    }
    folder = Path(out)
    rows = _begun(folder, about)
    done = {(row["method"], row["keep"], row["seed"], row["metric_healed"] is not None) for row in rows}
    wanted = dict.fromkeys(
        (way, keep, seed, way.name in heal)
        for way in ways
        for keep in ((0.5 if "2:4" in way.name else 1.0,) if way.name in WITHOUT_SHARE else keeps)
        for seed in (seeds if way.name in heal else seeds[:1])
    )
    todo = [one for one in wanted if (one[0].name, *one[1:]) not in done]
    left = [way for way, _, _, _ in todo]
    stats = statistics_for(subject, left, batches, allocation=allocation, progress=progress)
    original = subject.quality(subject.apply, subject.params) if todo else None
    bar = tqdm(todo, desc="methods", unit="row", total=len(rows) + len(todo), initial=len(rows), disable=not progress)
    for way, keep, seed, healed in bar:
        bar.set_postfix_str(f"{way.name} {keep:g}, seed {seed}")
        row, _ = compress_subject(
            subject, method=way.name, keep=keep, steps=steps if healed else 0, seed=seed, batches=batches, stats=stats,
            original=original, progress=progress, **settings,
        )  # fmt: skip
        if not (folder / "comparison.json").exists():  # only now: a call that fails leaves no folder
            _begin(folder, about, command)
        rows.append(row)
        with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return rows


def _begun(folder: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that are there, of the same model and settings."""
    head, file = folder / "comparison.json", folder / "rows.jsonl"
    if not head.exists():
        if file.exists():
            raise CompressError(f"{str(folder)!r} has rows of unknown settings: its comparison.json is gone.")
        return []
    try:
        begun = file.exists() and "\n" in file.read_text(encoding="utf-8")
        rows, found = read_rows(folder) if begun else ([], json.loads(head.read_text(encoding="utf-8")))
    except (RunFolderError, ValueError) as e:
        raise CompressError(f"{str(folder)!r} cannot be gone on with: {e}.\n  choose another folder") from None
    for key, value in about.items():
        if not isinstance(found, dict) or found.get(key) != value:
            was = found.get(key) if isinstance(found, dict) else None
            raise CompressError(
                f"{str(folder)!r} holds a comparison with {key} {was!r}, not {value!r}.\n"
                "  choose another folder, or the same settings"
            )
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if text and not text.endswith("\n"):  # a kill cut the last line
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return rows


def _begin(folder: Path, about: dict[str, Any], command: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"jax": jax.__version__, "lorax_kit": __version__, "device": jax.devices()[0].device_kind}
    text = json.dumps({**about, "command": command, **versions}, indent=2) + "\n"
    (folder / "comparison.json").write_text(text, encoding="utf-8")
