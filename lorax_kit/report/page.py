"""Writes the report of a run: one self-contained HTML page, its plots as files, and results.csv.

The only file that uses jinja2; the page itself is `page.html` beside it.
"""

from __future__ import annotations

import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from lorax_kit.report.answer import answer, cautions
from lorax_kit.report.conditions import Summary, summarise
from lorax_kit.report.figures import draw
from lorax_kit.report.plots import Plot
from lorax_kit.report.run_folder import RunFolder, read_run, replace_file
from lorax_kit.report.tables import bytes_text, plural, summary_rows, trial_rows, write_csv


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write `report.html`, `plots/*.png`, `plots/*.svg` and `results.csv` into a run folder.

    Works on a run that is still going or was killed; the page then says how many trials it covers. Every
    file is replaced atomically, so a browser or a second caller never sees half a file.

    Args:
      run_dir: A run folder, see `read_run`.

    Returns:
      The path of `report.html`.

    Raises:
      RunFolderError: The folder cannot be read as a run; nothing is written then.

    Example:
      >>> write_report("runs/demo")  # doctest: +SKIP
      PosixPath('runs/demo/report.html')
    """
    run = read_run(run_dir)
    summary = summarise(run)
    plots, left_out = draw(summary)
    page = _template().render(_context(summary, plots, left_out))
    write_csv(run, run.path / "results.csv")
    for plot in plots:
        replace_file(run.path / "plots" / f"{plot.name}.svg", plot.svg.encode())
        replace_file(run.path / "plots" / f"{plot.name}.png", plot.png)
    target = run.path / "report.html"
    replace_file(target, page.encode())
    return target


def _template() -> jinja2.Template:
    source = resources.files("lorax_kit.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _context(summary: Summary, plots: list[Plot], left_out: list[str]) -> dict[str, Any]:
    run = summary.run
    return {
        "name": str(run.study.get("name") or run.path.resolve().name),
        "subtitle": _subtitle(run),
        "facts": _facts(summary),
        "answer": answer(summary),
        "cautions": cautions(summary),
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
        "several": len(summary.ladders) > 1,
        "metric": summary.metric.replace("_", " "),
        "trials": trial_rows(summary),
        "failed": summary.failed,
        "environment": _flat(run.study.get("environment")),
        "task": _flat(run.study.get("task")),
        "groups": _groups(run),
        "command": str(run.study.get("command") or ""),
        "design": _json(run.study.get("design")),
        "spec": _json(run.study.get("spec")),
    }


def inline_svg(plot: Plot) -> str:
    """The figure as an `<svg>` element for a page that holds several.

    Without the XML prologue, scaled by its box, with ids made unique to the figure and its caption as label.
    """
    body = plot.svg[plot.svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{plot.name}-', body)
    body = re.sub(r'href="#', f'href="#{plot.name}-', body)
    body = body.replace("url(#", f"url(#{plot.name}-")
    head, rest = body.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-labelledby="{plot.name}-caption">{rest}'


def _subtitle(run: RunFolder) -> str:
    task = run.study.get("task") or {}
    parts = [str(task.get("name") or "")]
    sizes = [f"{task[key]:,} {key}" for key in ("train", "val", "test") if isinstance(task.get(key), int)]
    parts.append(", ".join(sizes))
    started = str(run.study.get("started") or "")
    parts.append(started.replace("T", " ")[:16])
    return " · ".join(part for part in parts if part)


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


def _groups(run: RunFolder) -> list[str]:
    lines = []
    for group in run.study.get("groups") or ():
        parts = [plural(int(group.get("trials") or 0), "trial")]
        if group.get("seconds") is not None:
            parts.append(f"{group['seconds']:.1f} s")
        if group.get("compile_seconds") is not None:
            parts.append(f"{group['compile_seconds']:.1f} s of it compiling")
        if group.get("estimated_bytes") is not None:
            parts.append(f"about {bytes_text(group['estimated_bytes'])}")
        lines.append(", ".join(parts))
    return lines


def _flat(value: Any) -> list[tuple[str, str]]:
    items = value.items() if isinstance(value, dict) else ()
    return [(str(key), v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for key, v in items]


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) if value else ""
