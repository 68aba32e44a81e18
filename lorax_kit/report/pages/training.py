"""Writes the page of one training: what was learnt from which data, epoch by epoch, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax_kit.analysis.statistics.intervals import over_examples
from lorax_kit.files.staging import replace_file
from lorax_kit.report.measure import Measure
from lorax_kit.report.pages.html import inline_svg, render
from lorax_kit.report.plots import Figure, canvas, family_style, legend_below, numbered
from lorax_kit.report.plots import render as drawn
from lorax_kit.report.tables.text import bytes_text, plural

MUCH_CUT = 0.1


@dataclass(frozen=True)
class Training:
    """What a page tells of a training.

    Attributes:
      name: of the problem.
      measures: of its metrics, the one that chose the epoch first, the loss among them.
      history: a row for each epoch: "epoch", "steps", "loss", "val_<metric>" each, "seconds".
      test: metric -> its value on the test set.
      examples: of the test set.
      best: the place in the history of the epoch that was kept.
      stopped: why training ended: "epochs", or what stopped it.
      data: the problem's facts: "rows", "train", "val", "test", "left_out", "cut", "length", "settings".
      spec: what is trained and how, as JSON data.
      run: the optimiser, rate, seed, steps and versions, as JSON data.
      trained, parameters: how many numbers are trained, and how many the model has.
      adapter_bytes: on disk.
    """

    name: str
    measures: Sequence[Measure]
    history: Sequence[Mapping[str, float]]
    test: Mapping[str, float]
    examples: int
    best: int
    stopped: str
    data: Mapping[str, Any]
    spec: Mapping[str, Any]
    run: Mapping[str, Any]
    trained: int
    parameters: int
    adapter_bytes: int

    @property
    def chief(self) -> Measure:
        """The metric that chose the epoch."""
        return self.measures[0]


def write_training_report(folder: str | Path, training: Training) -> Path:
    """Write `report.html` into a folder of `lorax-kit train`, and its figure as files into `plots`.

    Returns:
      The path of the page.

    Example:
      >>> write_training_report("runs/adapter", training)  # doctest: +SKIP
      PosixPath('runs/adapter/report.html')
    """
    plot = drawn("training", lambda: _figure(training))
    assert not isinstance(plot, str)
    page = render("training.html", **_context(training), svg=inline_svg(plot), caption=plot.caption)
    plot.write(Path(folder) / "plots")
    target = Path(folder) / "report.html"
    replace_file(target, page.encode())
    return target


def data_text(data: Mapping[str, Any]) -> str:
    """What was read and how it was split, in one sentence: "300 rows: 240 train, 30 val, 30 test"."""
    parts = ", ".join(f"{data[name]:,} {name}" for name in ("train", "val", "test") if isinstance(data.get(name), int))
    text = f"{data['rows']:,} rows: {parts}" if isinstance(data.get("rows"), int) else parts
    for why, count in (data.get("left_out") or {}).items():
        text += f"; left out {count:,} {why}"
    if data.get("cut"):
        text += f"; {data['cut']:,} cut at {data['length']} tokens"
    return text


def _context(training: Training) -> dict[str, Any]:
    chief, rows = training.chief, training.history
    value = training.test[chief.name]
    around = over_examples(value, training.examples) if chief.counted and training.examples > 0 else None
    shown = f"{chief.text(value)} over {training.examples:,} examples" if around is None else chief.interval(around)
    which = f"epoch {training.best + 1:.0f} of {len(rows)}, the {chief.highest} by validation {chief.word}"
    return {
        "name": training.name,
        "answer": f"Test {chief.word} {shown}; kept is {which}.",
        "cautions": _cautions(training),
        "facts": [
            ("trained", f"{training.trained:,} of {training.parameters:,} numbers"),
            ("adapter", bytes_text(training.adapter_bytes)),
            ("epochs", f"{len(rows)}"),
            ("time", f"{sum(row['seconds'] for row in rows):.0f} s"),
        ],
        "data": data_text(training.data),
        "metrics": [(one.word, one.text(training.test[one.name])) for one in training.measures],
        "heads": ["epoch", "steps", "training loss", *(f"validation {one.word}" for one in training.measures), "s"],
        "rows": [
            [
                f"{row['epoch']:.0f}",
                f"{row['steps']:,.0f}",
                f"{row['loss']:.4f}",
                *(one.text(row[f"val_{one.name}"]) for one in training.measures),
                f"{row['seconds']:.1f}",
            ]
            for row in rows
        ],
        "best": training.best,
        "spec": json.dumps(training.spec, indent=2),
        "run": json.dumps(training.run, indent=2),
        "problem": json.dumps(training.data.get("settings"), indent=2),
    }


def _cautions(training: Training) -> list[str]:
    """What a reader should know before trusting the numbers."""
    texts, rows = [], training.history
    if training.stopped != "epochs":
        texts.append(f"Training ended early: {training.stopped}.")
    elif training.best == len(rows) - 1 and len(rows) > 1:
        texts.append(f"The last epoch is the best of {len(rows)}: more epochs may give more.")
    total = sum(training.data.get(name) or 0 for name in ("train", "val", "test"))
    if (cut := training.data.get("cut") or 0) > MUCH_CUT * total:
        texts.append(f"{cut:,} of {total:,} examples are longer than {training.data['length']} tokens, and were cut.")
    if training.examples < 100:
        texts.append(f"The test set has {plural(training.examples, 'example')}: its figures are rough.")
    return texts


def _figure(training: Training) -> tuple[Figure, str]:
    """Losses by epoch, and the metric that chose beside them where it is another."""
    epochs, rows = [row["epoch"] for row in training.history], training.history
    panels = {"loss": [("training", "loss"), ("validation", "val_loss")]}
    if training.chief.name != "loss":
        panels[training.chief.word + training.chief.unit] = [("validation", f"val_{training.chief.name}")]
    figure = canvas(2.8)
    for place, (label, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place)
        factor = training.chief.factor if place == 2 else 1.0
        for name, key in lines:
            colour, marker = family_style(name == "validation")
            values = [factor * row[key] for row in rows]
            axes.plot(epochs, values, marker=marker, ms=4, lw=1.6, color=colour, label=name)
        axes.axvline(epochs[training.best], color="#bbbbbb", lw=1, ls="--", zorder=0)
        axes.set(xlabel="epoch", ylabel=label)
        numbered(axes, len(epochs))
        if place == 1:
            legend_below(figure, axes)
    return figure, "By epoch; the dashed line is at the one that was kept. The training loss is a mean over the epoch."
