"""The page of a comparison of compressions: quality against bytes, FLOPs, latency and memory, and a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from lorax_kit.analysis.statistics.conditions import Interval, interval
from lorax_kit.files.lines import whole_lines
from lorax_kit.files.staging import replace_file
from lorax_kit.json_text import parse_json, read_json
from lorax_kit.report.figures.pareto import pareto_front
from lorax_kit.report.pages.html import inline_svg, render
from lorax_kit.report.plots import (
    FAINT,
    INK,
    MARKERS,
    OKABE_ITO,
    QUIET,
    Figure,
    Plot,
    canvas,
    legend_below,
    log_values,
)
from lorax_kit.report.plots import render as render_plot
from lorax_kit.report.run_folder import RunFolderError
from lorax_kit.report.tables.text import bytes_text

COSTS = {"bytes_ratio": "bytes", "flops_ratio": "FLOPs", "latency_ratio": "latency", "memory_ratio": "peak memory"}
MOST = 30
"""Perplexities above so many times the original's are drawn at the edge."""
FAMILIES = (
    "svd",
    "fisher",
    "asvd",
    "whitened",
    "low-rank, quantised",
    "pruned",
    "quantised",
    "student",
    "original_tuned",
)
LOOKS = (*zip(OKABE_ITO, MARKERS, strict=True), (QUIET, "*"))
"""Colour and marker of each family."""
COLUMNS = (
    *("subject", "method", "keep", "seed", "params", "bytes", "bytes_ratio", "model_bytes", "model_ratio"),
    *("flops_ratio", "latency_ms", "latency_ratio", "memory_ratio", "metric"),
    *("metric_before", "metric_after", "metric_healed", "agreement_after", "agreement_healed"),
)


@dataclass(frozen=True)
class Line:
    """One method at one share, over the seeds of its healing.

    Attributes:
      method, keep: which.
      row: of the first seed; what does not depend on the seed.
      seeds: how many healed ones.
      healed, agreement: over the seeds, with 95 % intervals; None where nothing was healed.
    """

    method: str
    keep: float
    row: Mapping[str, Any]
    seeds: int
    healed: Interval | None
    agreement: Interval | None

    @property
    def best(self) -> float:
        """The metric it ends with."""
        return float(self.row["metric_after"]) if self.healed is None else self.healed.mean

    @property
    def family(self) -> int:
        """Index in FAMILIES."""
        name = self.method.removesuffix(", in turn")
        if "+" in name:
            return 4
        if name in FAMILIES:
            return FAMILIES.index(name)
        return 5 if name.startswith(("magnitude", "wanda")) else 6


def lines_of(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Rows gathered over seeds, in their order."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["keep"]), []).append(row)

    def over(measured: list[Mapping[str, Any]], name: str) -> Interval | None:
        values = [row[name] for row in measured if row[name] is not None]
        return interval(values) if values else None

    lines = []
    for (method, keep), group in groups.items():
        healed = [row for row in group if row["metric_healed"] is not None]
        intervals = over(healed, "metric_healed"), over(healed, "agreement_healed")
        lines.append(Line(method, keep, (healed or group)[0], len(healed), *intervals))
    return lines


def front(lines: Sequence[Line], cost: str) -> list[Line]:
    """Those that no other beats in both the cost and the metric, from the cheapest; a metric must be finite for it."""
    better = "higher" if lines[0].row["metric"] == "accuracy" else "lower"
    kept = pareto_front([line.row[cost] for line in lines], [line.best for line in lines], better)
    return [lines[i] for i in kept]


def write_comparison(folder: str | Path) -> Path:
    """Write `report.html`, `plots/pareto.{png,svg,pdf}` and `results.csv` from a folder's `rows.jsonl`.

    Returns:
      The path of `report.html`.

    Raises:
      RunFolderError: the folder holds no rows.

    Example:
      >>> write_comparison("runs/compress")  # doctest: +SKIP
      PosixPath('runs/compress/report.html')
    """
    path = Path(folder)
    rows, about = read_rows(path)
    lines = lines_of(rows)
    plot = render_plot("pareto", lambda: _pareto(lines))
    assert isinstance(plot, Plot)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path / "results.csv", text.getvalue().encode())
    plot.write(path / "plots")
    first = rows[0]
    fronts = {id(line) for line in front(lines, "bytes_ratio")}
    page = render(
        "compression.html",
        name=first["subject"],
        metric=first["metric"],
        original=_number(first["metric_before"], first["metric"]),
        facts=[(key, value if isinstance(value, str) else json.dumps(value)) for key, value in about.items()],
        svg=inline_svg(plot),
        caption=plot.caption,
        lines=[_cells(line, id(line) in fronts) for line in lines],
    )
    replace_file(path / "report.html", page.encode())
    return path / "report.html"


def read_rows(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a comparison, and its settings.

    Raises:
      RunFolderError: files that are missing or damaged, or no rows yet.
    """
    try:
        about = read_json(path / "comparison.json")
        rows = [parse_json(line) for line in whole_lines((path / "rows.jsonl").read_bytes())]
        if not isinstance(about, dict) or not all(map(_whole, rows)):
            raise ValueError("rows or settings lack what this version writes")
    except (OSError, ValueError) as e:
        raise RunFolderError(f"{str(path)!r} holds no comparison: {e}.") from None
    if not rows:
        raise RunFolderError(f"{str(path)!r} has no finished row yet.")
    return rows, about


def _whole(row: Any) -> bool:
    """Whether a row has every column, each of its kind."""
    if not isinstance(row, dict) or not set(COLUMNS) <= set(row) or row["metric"] not in ("accuracy", "perplexity"):
        return False
    words = ("subject", "method", "metric")
    maybe = ("latency_ms", "latency_ratio", "metric_healed", "agreement_after", "agreement_healed")
    numbers = [row[name] for name in COLUMNS if name not in words and not (name in maybe and row[name] is None)]
    return all(type(row[name]) is str for name in words) and all(type(x) in (int, float) for x in numbers)


def comparison_table(folder: str | Path) -> str:
    """The lines of a comparison as aligned text."""
    cells = [_cells(line, False) for line in lines_of(read_rows(Path(folder))[0])]
    names = [name for name in cells[0] if name != "front"]
    table = [names, *([row[name] for name in names] for row in cells)]
    widths = [max(len(row[i]) for row in table) for i in range(len(names))]
    return "\n".join("  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in table)


def _cells(line: Line, on_front: bool) -> dict[str, Any]:
    row, metric = line.row, line.row["metric"]
    agreement = row["agreement_after"] if line.agreement is None else line.agreement.mean
    return {
        "front": on_front,
        "method": line.method,
        "keep": f"{line.keep:g}",
        "bytes": f"{row['bytes_ratio']:.3f}x",
        "model": bytes_text(row["model_bytes"]),
        "FLOPs": f"{row['flops_ratio']:.2f}x",
        "latency": "" if row["latency_ratio"] is None else f"{row['latency_ratio']:.2f}x",
        "memory": f"{row['memory_ratio']:.2f}x",
        "after": _number(row["metric_after"], metric),
        "healed": "" if line.healed is None else _interval(line.healed, metric),
        "seeds": "" if line.healed is None else str(line.seeds),
        "agreement": "" if agreement is None else f"{100 * agreement:.1f} %",
    }


def _number(x: float, metric: str) -> str:
    return f"{100 * x:.1f} %" if metric == "accuracy" else f"{x:.2f}" if x < 1000 else f"{x:.3g}"


def _interval(x: Interval, metric: str) -> str:
    if x.low != x.low or x.low == x.high:
        return _number(x.mean, metric)
    return f"{_number(x.mean, metric)} [{_number(x.low, metric)}, {_number(x.high, metric)}]"


def _pareto(lines: Sequence[Line]) -> tuple[Figure, str]:
    metric, original = lines[0].row["metric"], lines[0].row["metric_before"]
    costs = {key: text for key, text in COSTS.items() if all(line.row[key] is not None for line in lines)}
    figure = canvas(6.4 if len(costs) > 2 else 3.6)
    panels = figure.subplots((len(costs) + 1) // 2, 2, sharey=True, squeeze=False).ravel()
    named: set[int] = set()

    def shown(x: float) -> float:
        return 100 * x if metric == "accuracy" else min(x, MOST * original)

    for axes, (cost, text) in zip(panels, costs.items(), strict=False):
        axes.axhline(shown(original), color=QUIET, linewidth=0.8)
        axes.axvline(1, color=FAINT, linewidth=0.8, zorder=0)
        for line in lines:
            x, (colour, marker) = line.row[cost], LOOKS[line.family]
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4.5, "linestyle": "none"}
            label = None if line.family in named else FAMILIES[line.family]
            named.add(line.family)
            if line.healed is not None:
                after = shown(line.row["metric_after"])
                axes.plot([x, x], [after, shown(line.best)], color=colour, linewidth=0.6)
                axes.plot(x, after, **style | {"markerfacecolor": "white", "markersize": 3.5})
                if line.healed.low == line.healed.low:
                    ends = [shown(line.healed.low), shown(line.healed.high)]
                    axes.plot([x, x], ends, color=colour, linewidth=1.8)
            axes.plot(x, shown(line.best), label=label, clip_on=False, **style)
        best = front(lines, cost)
        axes.plot(
            [line.row[cost] for line in best], [shown(line.best) for line in best], color=INK, linewidth=0.7, zorder=0
        )
        axes.set_xlabel(text)
        axes.set_xlim(left=0)
        if metric == "perplexity":
            axes.set_yscale("log")
            axes.set_ylim(0.8 * min([original, *(line.best for line in lines if isfinite(line.best))]), MOST * original)
            log_values(axes)
    for axes in panels[len(costs) :]:
        axes.set_visible(False)
    for axes in figure.axes[::2]:
        axes.set_ylabel("accuracy, %" if metric == "accuracy" else "perplexity")
    legend_below(figure, figure.axes[0])
    edge = f" Perplexities above {MOST * original:.0f} are drawn at the edge." if metric == "perplexity" else ""
    caption = (
        f"What is left of the {metric} (grey line: the original) against costs, as shares of the original's. Hollow "
        "marks are before healing, filled ones what a method ends with (original_tuned: the original, trained "
        "as long by the same loss), thick bars 95 % intervals over seeds; the "
        f"black line joins those that no other beats in both.{edge}"
    )
    return figure, caption
