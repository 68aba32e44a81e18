"""Writes the report of a run: one self-contained HTML page, its plots as files, and results.csv."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorax_kit.files.staging import replace_file
from lorax_kit.report.answer import answer, cautions
from lorax_kit.report.claims import examples_error, more_seeds
from lorax_kit.report.conditions import Summary, summarise
from lorax_kit.report.figures import FIGURES, STALE, draw
from lorax_kit.report.pages.html import inline_svg, render
from lorax_kit.report.plots import KINDS, Plot
from lorax_kit.report.run_folder import RunFolder, read_run
from lorax_kit.report.tables.latex import write_tables
from lorax_kit.report.tables.methods import REFERENCE, method_rows
from lorax_kit.report.tables.summary import CHOSEN, setting_head, summary_rows
from lorax_kit.report.tables.text import bytes_text, plural
from lorax_kit.report.tables.trials import trial_columns, trial_rows, write_csv


def write_report(run_dir: str | os.PathLike[str], *, margin: float | None = None) -> Path:
    """Write `report.html`, `plots/*.{png,svg,pdf}`, `tables/*.tex` and `results.csv` into a run folder.

    Works on a run that is still going or was killed; the page then says how many trials it covers. Every
    file is replaced atomically, so a browser or a second caller never sees half a file.

    Args:
      run_dir: A run folder, see `read_run`.
      margin: The largest change for the worse that does not matter, in its units (0.01 is a percentage point of a
        share): smaller ranks that lose less are said to be not inferior. None: what the study says, else 0.01 for
        shares, else no such claim is made.

    Returns:
      The path of `report.html`.

    Raises:
      RunFolderError: The folder cannot be read as a run; nothing is written then.
      ValueError: A margin that is not above zero; likewise.

    Example:
      >>> write_report("runs/demo")  # doctest: +SKIP
      PosixPath('runs/demo/report.html')
    """
    run = read_run(run_dir)
    summary = summarise(run, margin=margin)
    plots, left_out = draw(summary)
    page = render("run.html", **_context(summary, plots, left_out))
    write_csv(run, run.path / "results.csv")
    write_tables(summary, run.path / "tables")
    for plot in plots:
        plot.write(run.path / "plots")
    for stale in {*STALE, *(maker.__name__ for maker in FIGURES)} - {plot.name for plot in plots}:
        for kind in KINDS:
            (run.path / "plots" / f"{stale}.{kind}").unlink(missing_ok=True)
    target = run.path / "report.html"
    replace_file(target, page.encode())
    return target


def _context(summary: Summary, plots: list[Plot], left_out: list[str]) -> dict[str, Any]:
    run = summary.run
    return {
        "name": str(run.study.get("name") or run.path.resolve().name),
        "subtitle": _subtitle(run),
        "facts": _facts(summary),
        "answer": answer(summary),
        "cautions": cautions(summary),
        "more_seeds": more_seeds(summary),
        "figures": [
            {
                "name": plot.name,
                "caption": plot.caption,
                "svg": inline_svg(plot),
            }
            for plot in plots
        ],
        "left_out": left_out,
        "rows": summary_rows(summary),
        "methods": method_rows(summary),
        "reference": REFERENCE,
        "several": len(summary.ladders) > 1,
        "metric": summary.label,
        "word": summary.measure.word,
        "unit": ", %" if summary.measure.share else "",
        "setting_head": setting_head(summary),
        "chosen": CHOSEN,
        "limits": _limits(summary),
        "trials": trial_rows(summary),
        "trial_columns": trial_columns(summary),
        "failed": [*summary.failed, *summary.stopped],
        "environment": _flat(run.study.get("environment")),
        "task": _flat(run.study.get("task")),
        "compiles": _compiles(run),
        "groups": _groups(run),
        "command": str(run.study.get("command") or ""),
        "design": _json(run.study.get("design")),
        "spec": _json(run.study.get("spec")),
    }


def _subtitle(run: RunFolder) -> str:
    task = run.study.get("task") or {}
    parts = [str(task.get("name") or "")]
    sizes = [f"{task[key]:,} {key}" for key in ("train", "val", "test") if isinstance(task.get(key), int)]
    parts.append(", ".join(sizes))
    started = str(run.study.get("started") or "")
    parts.append(started.replace("T", " ")[:16] + (" UTC" if started.endswith("+00:00") else ""))
    return " · ".join(part for part in parts if part)


def _limits(summary: Summary) -> str:
    """What the intervals over seeds leave out: the sample of examples and, with a shared stream, the data order."""
    parts = []
    error = None if summary.best is None else examples_error(summary, summary.best, summary.metric)
    if error is not None:
        parts.append(
            f"The {'test' if summary.tested else 'validation'} set has an error of its own, which the intervals leave "
            "out and more seeds do not narrow, since every trial is measured on the same examples: over all examples "
            f"that they were drawn from, an {summary.measure.word} of {summary.measure.interval(error)}."
        )
    if (summary.run.study.get("design") or {}).get("stream") == "shared":
        parts.append(
            "All trials saw the same batches in the same order: the seeds vary what is drawn (factors, head, random "
            "numbers of training), not the order of the data."
        )
    return " ".join(parts)


def _facts(summary: Summary) -> list[tuple[str, str]]:
    run = summary.run
    seeds = {trial["seed"] for trial in run.trials}
    facts = [("trials", f"{len(run.trials)} of {run.planned}")]
    if summary.failed:
        facts.append(("diverged", str(len(summary.failed))))
    facts.append(("ranks", ", ".join(map(str, summary.ranks)) or "none"))
    facts.append(("seeds", str(len(seeds))))
    if isinstance(run.study.get("compiles"), int):
        facts.append(("compilations", str(run.study["compiles"])))
    if isinstance(run.study.get("seconds"), int | float):
        facts.append(("wall time", _duration(run.study["seconds"])))
    return facts


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _compiles(run: RunFolder) -> str:
    """How many programs were compiled for how many trained groups."""
    groups = run.study.get("groups") or ()
    compiles = run.study.get("compiles")
    if not isinstance(compiles, int) or not groups:
        return ""
    return f"The training step was compiled {_times(compiles)} for {plural(len(groups), 'group')} of stacked trials."


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _groups(run: RunFolder) -> list[dict[str, str]]:
    """One row per trained group, formatted; what a group did not record is left blank."""
    forms: dict[str, Callable[[Any], str]] = {
        "trials": str,
        "size": str,
        "estimated_bytes": bytes_text,
        "temp_bytes": lambda size: bytes_text(size) if size else "not reported",
        "seconds": "{:.1f}".format,
        "compile_seconds": "{:.1f}".format,
    }
    return [
        {key: "" if group.get(key) is None else form(group[key]) for key, form in forms.items()}
        for group in run.study.get("groups") or ()
    ]


def _flat(value: Any) -> list[tuple[str, str]]:
    items = value.items() if isinstance(value, dict) else ()
    return [(str(key), v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for key, v in items]


def _json(value: Any) -> str:
    """A config's value per line: `json.dumps(indent=2)` spends a page on lists of numbers."""
    if not isinstance(value, dict) or not value:
        return ""
    lines = (f"  {json.dumps(key)}: {_nested(item)}" for key, item in value.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def _nested(value: Any) -> str:
    """On one line if it is short; otherwise an item per line."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= 80 or not isinstance(value, dict | list):
        return text
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {json.dumps(item, ensure_ascii=False)}" for key, item in value.items()]
    else:
        items = [json.dumps(item, ensure_ascii=False) for item in value]
    opening, closing = text[0], text[-1]
    return f"{opening}\n" + ",\n".join(f"    {item}" for item in items) + f"\n  {closing}"
