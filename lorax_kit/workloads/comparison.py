"""Compares many ways of making one model smaller, row by row, into a folder that a later call goes on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from lorax_kit.core.errors import CompressError
from lorax_kit.version import __version__
from lorax_kit.workloads.compression import compress_subject
from lorax_kit.workloads.methods import Method, statistics_of
from lorax_kit.workloads.subjects import Subject

METHODS = (
    *("svd", "fisher", "asvd", "whitened", "whitened+int8", "whitened+residual-nf4"),
    *("magnitude", "wanda", "wanda-2:4", "int8", "int4", "nf4", "student"),
)
WITHOUT_SHARE = ("int8", "int4", "nf4", "magnitude-2:4", "wanda-2:4")
"""Methods whose share of the parameters is not a choice."""


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
    ways = [Method.parse(name) for name in methods]
    for name in heal:
        if not Method.parse(name).healed:
            raise CompressError(f"{name!r} leaves nothing low-rank to heal.\n  heal svd, fisher, asvd or whitened")
    about = {
        "subject": subject.name,
        "targets": list(subject.targets),
        "batches": batches,
        "steps": steps,
        **{name: settings[name] for name in sorted(settings)},
    }
    folder = Path(out)
    rows = _begun(folder, about, command)
    done = {(row["method"], row["keep"], row["seed"], row["metric_healed"] is not None) for row in rows}
    todo = [
        (way, keep, seed, way.name in heal)
        for way in ways
        for keep in ((0.5 if "2:4" in way.name else 1.0,) if way.name in WITHOUT_SHARE else keeps)
        for seed in (seeds if way.name in heal else seeds[:1])
        if (way.name, keep, seed, way.name in heal) not in done
    ]
    calibrated = [way for way, _, _, _ in todo if way.calibrated]
    stats = None
    if calibrated:
        fisher = any(way.wants_gradients(settings.get("allocation", "loss")) for way in calibrated)
        stats = statistics_of(subject, batches, fisher=fisher, progress=progress)
    original = subject.quality(subject.apply, subject.params) if todo else None
    bar = tqdm(todo, desc="methods", unit="row", total=len(rows) + len(todo), initial=len(rows), disable=not progress)
    for way, keep, seed, healed in bar:
        bar.set_postfix_str(f"{way.name} {keep:g}, seed {seed}")
        row, _ = compress_subject(
            subject, method=way.name, keep=keep, steps=steps if healed else 0, seed=seed, batches=batches, stats=stats,
            original=original, progress=progress, **settings,
        )  # fmt: skip
        rows.append(row)
        with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return rows


def _begun(folder: Path, about: dict[str, Any], command: str) -> list[dict[str, Any]]:
    """The rows that are there, of the same settings."""
    head, rows = folder / "comparison.json", folder / "rows.jsonl"
    if head.exists():
        found = json.loads(head.read_text(encoding="utf-8"))
        other = [key for key, value in about.items() if found.get(key) != value]
        if other:
            key = other[0]
            raise CompressError(
                f"{str(folder)!r} holds a comparison with {key} {found.get(key)!r}, not {about[key]!r}.\n"
                "  choose another folder, or the same settings"
            )
        lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
        whole = [line for line in lines if line.endswith("}")]
        if whole != lines:  # a kill cut the last line
            rows.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
        return [json.loads(line) for line in whole]
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"jax": jax.__version__, "lorax_kit": __version__, "device": jax.devices()[0].device_kind}
    head.write_text(json.dumps({**about, "command": command, **versions}, indent=2) + "\n", encoding="utf-8")
    return []
