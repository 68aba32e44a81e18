"""Tables of a run: results.csv, the summary by condition, and the same as text for a terminal."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from lorax_kit.analysis.statistics import seeds_needed
from lorax_kit.report.conditions import Condition, Summary, summarise
from lorax_kit.report.measure import measures
from lorax_kit.report.run_folder import RunFolder, replace_file

BEFORE = (
    "trial",
    "rank",
    "alpha",
    "lr",
    "seed",
    "targets",
    "variant",
    "params",
    "factor_bytes",
    "adapter_bytes",
    "steps",
    "train_loss",
)
AFTER = (
    "train_seconds",
    "compiles",
    "status",
    "failed_step",
)

CHOSEN = "chosen"


def columns(run: RunFolder) -> tuple[str, ...]:
    """The columns of `results.csv`: what a trial was, `val_<metric>` and `test_<metric>` of every metric, its cost."""
    names = [measure.name for measure in measures(run.study)]
    return (*BEFORE, *(f"{part}_{name}" for part in ("val", "test") for name in names), *AFTER)


def write_csv(run: RunFolder, path: str | Path) -> Path:
    """Write one line per trial with the columns of `columns`; missing values are empty cells.

    Units: `adapter_bytes` in bytes, `train_seconds` in seconds, shares in [0, 1].
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns(run), restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(run.trials)
    path = Path(path)
    replace_file(path, text.getvalue().encode())
    return path


def summary_rows(summary: Summary) -> list[dict[str, str]]:
    """One row of formatted cells per condition at its chosen rate, the probe first.

    Keys: setting, rank, rate, seeds, metric, validation, loss, params, size, difference, p.
    `difference` is the mean paired difference to the condition with the best mean validation metric (its own cell says
    "chosen"), in percentage points of a share; `p` is Holm-corrected.
    """
    chosen = [condition for ladder in summary.ladders.values() for condition in ladder]
    return [_row(summary, condition) for condition in [*([summary.probe] if summary.probe else []), *chosen]]


def summary_table(run: RunFolder) -> str:
    """The summary by condition as aligned plain text, for a terminal.

    Example:
      >>> print(summary_table(read_run("runs/demo")))  # doctest: +SKIP
      demo: 18 of 18 trials
       rank     lr  seeds  test accuracy (95 %)   params   adapter  vs chosen  p (Holm)
      ...
    """
    summary = summarise(run)
    heads = {
        "setting": "targets, variant, alpha",
        "rank": "rank",
        "rate": "lr",
        "seeds": "seeds",
        "metric": f"{summary.label} (95 %)",
        "params": "params",
        "size": "adapter",
        "difference": "vs chosen (95 %)",
        "p": "p (Holm)",
    }
    rows = summary_rows(summary)
    if len(summary.ladders) <= 1:
        del heads["setting"]
    widths = {key: max(len(head), *(len(row[key]) for row in rows)) for key, head in heads.items()}

    def line(cells: dict[str, str]) -> str:
        return "  ".join(
            cells[key].ljust(width) if key == "setting" else cells[key].rjust(width) for key, width in widths.items()
        ).rstrip()

    name = run.study.get("name") or run.path.name
    lines = [f"{name}: {len(run.trials)} of {run.planned} trials", line(heads), *map(line, rows)]
    tests = [c for c in summary.comparisons if c.pairs]
    needed = seeds_needed(len(tests))
    if tests and max(c.pairs for c in tests) < needed:
        lines.append(
            f"p cannot fall below 0.05 with fewer than {needed} seeds ({plural(len(tests), 'comparison')}, Holm): "
            "read the intervals."
        )
    if summary.failed:
        lines.append(f"{plural(len(summary.failed), 'trial')} diverged; left out of the means.")
    return "\n".join(lines)


def trial_rows(summary: Summary) -> list[dict[str, tuple[str, float | str]]]:
    """Every trial as column -> (text, value to sort by)."""
    formats = {
        "lr": "g",
        "alpha": "g",
        "params": ",.0f",
        "train_loss": ".4f",
        "train_seconds": ".1f",
    }
    shown = {f"{part}_{one.name}": one for part in ("val", "test") for one in measures(summary.run.study)}
    rows = []
    for trial in summary.run.trials:
        cells: dict[str, tuple[str, float | str]] = {}
        for column in columns(summary.run):
            value = trial.get(column)
            if isinstance(value, bool) or not isinstance(value, int | float):
                cells[column] = ("" if value is None else str(value), "" if value is None else str(value))
            elif not math.isfinite(value):
                cells[column] = (str(value), "")
            elif column in shown:
                cells[column] = (shown[column].cell(value), value)
            elif column == "adapter_bytes":
                cells[column] = (bytes_text(value), value)
            else:
                cells[column] = (format(value, formats.get(column, "")), value)
        rows.append(cells)
    return rows


def _row(summary: Summary, condition: Condition) -> dict[str, str]:
    found, measure = summary.comparison(condition), summary.measure
    params, size = condition.first("params"), condition.first("adapter_bytes")
    difference = p = ""
    if condition is summary.best:
        difference = CHOSEN
    elif found is not None and found.pairs:
        difference, p = measure.signed(found.difference), p_text(found.p_holm)
        if not math.isnan(found.low):
            difference += f" [{measure.signed(found.low)}, {measure.signed(found.high)}]"
    return {
        "setting": "frozen encoder" if condition.rank == 0 else str(condition.family),
        "rank": "probe" if condition.rank == 0 else str(condition.rank),
        "rate": f"{condition.lr:g}",
        "seeds": _seeds(condition),
        "metric": measure.interval(condition.interval(summary.metric), short=True),
        "validation": measure.short(condition.mean(summary.choice)),
        "loss": _number(condition.mean("val_loss"), ".4f"),
        "params": "" if params is None else f"{params:,.0f}",
        "size": "" if size is None else bytes_text(size),
        "difference": difference,
        "p": p,
    }


def _seeds(condition: Condition) -> str:
    lost = len(condition.trials) - len(condition.done)
    return f"{len(condition.done)} (+{lost} failed)" if lost else str(len(condition.done))


def _number(value: float, spec: str) -> str:
    return "" if math.isnan(value) else format(value, spec)


def p_text(p: float) -> str:
    """Three decimals, a bound below 0.001, a dash for nan."""
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def count_text(value: float) -> str:
    """Three digits: 83714 -> "83.7k"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def bytes_text(size: float) -> str:
    """Binary units: 294912 -> "288 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def plural(count: int, noun: str) -> str:
    """1 -> "1 trial", 2 -> "2 trials"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
