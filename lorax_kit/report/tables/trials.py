"""One line per trial: results.csv, and the cells of the page's table."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import NamedTuple

from lorax_kit.files.staging import replace_file
from lorax_kit.report.conditions import Summary
from lorax_kit.report.measure import measures
from lorax_kit.report.run_folder import RunFolder
from lorax_kit.report.settings import PREFIX, setting_columns
from lorax_kit.report.tables.text import bytes_text

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
STOPPED_AT = "stopped_at"


def columns(run: RunFolder) -> tuple[str, ...]:
    """The columns of `results.csv`: what a trial was, `val_<metric>` and `test_<metric>` of every metric, its cost.

    At their end, further settings that differ within the run, and `stopped_at` where trials were stopped early.
    """
    names = [measure.name for measure in measures(run.study)]
    scores = (f"{part}_{name}" for part in ("val", "test") for name in names)
    stopped = (STOPPED_AT,) if any(trial.get(STOPPED_AT) is not None for trial in run.trials) else ()
    return (*BEFORE, *scores, *AFTER, *setting_columns(run.trials), *stopped)


def write_csv(run: RunFolder, path: str | Path) -> Path:
    """Write one line per trial with the columns of `columns`; missing values are empty cells.

    Units: `adapter_bytes` in bytes, `train_seconds` in seconds, shares in [0, 1].
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns(run), restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _plain(value) for key, value in trial.items()} for trial in run.trials)
    path = Path(path)
    replace_file(path, text.getvalue().encode())
    return path


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
            value = _plain(trial.get(column))
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


class Column(NamedTuple):
    """A column of the page's table.

    Attributes:
      key: in `trial_rows`.
      label: its heading.
      text: whether it holds words.
      factor: what the numbers to sort by are multiplied by where they are shown.
    """

    key: str
    label: str
    text: bool = False
    factor: float = 1.0


def trial_columns(summary: Summary) -> list[Column]:
    """The columns of the page's table: all metrics of the validation set, the chosen one of the test set."""
    run, chosen = summary.run, summary.measure
    scores = [Column(f"val_{one.name}", f"val {one.word}", factor=one.factor) for one in measures(run.study)]
    scores.append(Column(f"test_{chosen.name}", f"test {chosen.word}", factor=chosen.factor))
    last = [Column("train_seconds", "time, s"), Column("status", "status", text=True)]
    last += [Column(STOPPED_AT, "stopped at")] * (STOPPED_AT in columns(run))
    further = []
    for name in setting_columns(run.trials):
        words = any(not isinstance(trial.get(name), int | float | None) for trial in run.trials)
        further.append(Column(name, name.removeprefix(PREFIX).replace("_", " "), text=words))
    return [
        Column("trial", "trial", text=True),
        *(Column(name, name) for name in ("rank", "alpha", "lr", "seed")),
        *(Column(name, name, text=True) for name in ("targets", "variant")),
        *further,
        Column("params", "params"),
        Column("train_loss", "train loss"),
        *scores,
        *last,
    ]


def _plain(value: object) -> object:
    """Mappings and lists as JSON, so that a cell can be read back."""
    return json.dumps(value) if isinstance(value, dict | list) else value
