"""The metric by rank, by rank and rate, and what a rank costs."""

from __future__ import annotations

import math

import numpy as np

from lorax_kit.report.conditions import Summary
from lorax_kit.report.figures.marks import Made, choice, draw_interval, draw_probe, methods_used
from lorax_kit.report.figures.series import rate_map
from lorax_kit.report.plots import (
    Axes,
    canvas,
    colour_bar,
    family_style,
    frame_cell,
    heat_map,
    legend_below,
    log_axis,
    rank_axis,
    write_cells,
)
from lorax_kit.report.tables.text import bytes_text, count_text


def metric_by_rank(summary: Summary) -> Made:
    """The metric of the chosen condition of each rank, per family, every seed drawn."""
    if not any(c.values(summary.metric).size for ladder in summary.ladders.values() for c in ladder):
        return f"{summary.label.capitalize()} by rank: no adapted trial finished with it."
    figure = canvas(3.7)
    axes = figure.add_subplot()
    draw_probe(axes, summary)
    many = len(summary.ladders) > 1
    slot = 0.7 / len(summary.ladders)
    shift = 0.2 * slot if many else 0.07  # seeds to the left of their interval, so neither hides the other
    for k, (family, ladder) in enumerate(summary.ladders.items()):
        colour, marker = family_style(k)
        middle = (k - (len(summary.ladders) - 1) / 2) * slot
        xs = [summary.ranks.index(condition.rank) + middle for condition in ladder]
        for x, condition in zip(xs, ladder, strict=True):
            seeds = summary.measure.factor * condition.values(summary.metric)
            axes.plot([x - shift] * seeds.size, seeds, "o", ms=3.2, mew=0, color=colour, alpha=0.5)
            draw_interval(axes, x + shift, condition, summary, colour, marker)
            lost = len(condition.trials) - len(condition.done)
            if lost:
                place = ("data", "axes fraction")
                axes.annotate(f"×{lost}", (x, 0.015), xycoords=place, ha="center", color=colour)
        means = [summary.measure.factor * condition.mean(summary.metric) for condition in ladder]
        axes.plot([x + shift for x in xs], means, lw=0.8, color=colour, alpha=0.5)
        if many:
            axes.plot([], [], marker, color=colour, label=str(family))
    rank_axis(axes, summary.ranks)
    axes.set_ylabel(f"{summary.label}{summary.measure.unit}")
    axes.margins(y=0.12)
    legend_below(figure, axes, columns=2 if many else 1)
    caption = (
        f"{summary.label.capitalize()} by rank. Large markers are means over seeds, bars their 95 % "
        f"intervals ({methods_used(summary)}), small dots the single seeds.{choice(summary)}"
    )
    if summary.probe is not None and summary.probe.values(summary.metric).size:
        caption += " The grey band is the frozen base with a trained head (mean and 95 % interval)."
    if any(len(c.done) < len(c.trials) for ladder in summary.ladders.values() for c in ladder):
        caption += f" ×n: n seeds {summary.lost} and are not in the mean."
    return figure, caption


def cost_by_rank(summary: Summary) -> Made:
    """Trained parameters and adapter size by rank."""
    panels = [("params", "trained parameters", count_text), ("adapter_bytes", "adapter on disk", bytes_text)]
    chosen = [condition for ladder in summary.ladders.values() for condition in ladder]
    panels = [panel for panel in panels if sum(bool(c.first(panel[0])) for c in chosen) > 1]
    if not panels:
        return "Cost by rank: it takes two conditions that record parameters or bytes."
    # Families of equal cost would hide each other: they share one line and one name.
    lines: dict[tuple[tuple[float, ...], ...], list[str]] = {}
    for family, ladder in summary.ladders.items():
        ranks = tuple(float(c.rank) for c in ladder)
        costs = (tuple(float(c.first(key) or math.nan) for c in ladder) for key, _, _ in panels)
        lines.setdefault((ranks, *costs), []).append(str(family))
    figure = canvas(2.6 + (0.2 * len(lines) if len(summary.ladders) > 1 else 0))
    first: Axes | None = None
    for position, (_, label, text) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), position)
        first = first or axes
        for k, (line, names) in enumerate(lines.items()):
            colour, marker = family_style(k)
            xs = [summary.ranks.index(int(rank)) for rank in line[0]]
            name = "; ".join(names) if len(summary.ladders) > 1 else None
            axes.plot(xs, line[position], marker + "-", color=colour, ms=4.5, lw=0.9, label=name)
        log_axis(axes, "y", [value for line in lines for value in line[position]], text)
        axes.set_ylabel(f"{label} (log scale)")
        rank_axis(axes, summary.ranks)
    if first is not None:
        legend_below(figure, first, columns=1)
    return figure, "What a rank costs: trained parameters and the size of the adapter on disk, on log scales."


def rate_by_rank(summary: Summary) -> Made:
    """Mean validation metric over the grid of ranks and learning rates."""
    if len(summary.rates) < 2:
        return "Rate by rank: only one learning rate was tried."
    maps = {family: rate_map(summary, family) for family in summary.ladders}
    finite = np.concatenate([values[np.isfinite(values)] for values, _ in maps.values()])
    if not finite.size:
        return f"Rate by rank: no trial finished with a validation {summary.measure.word}."
    # At least a point wide for a share: noise between equal cells must not look like structure.
    least = 1.0 if summary.measure.share else 1e-9
    limits = (float(min(finite.min(), finite.max() - least)), float(finite.max()))
    columns = min(2, len(maps))
    rows = math.ceil(len(maps) / columns)
    figure = canvas((0.4 * len(summary.rates) + 0.9) * rows + 0.3)
    panels = []
    for k, (family, (values, lost)) in enumerate(maps.items()):
        axes = figure.add_subplot(rows, columns, k + 1)
        panels.append((axes, heat_map(axes, values, limits)))

        def text(row: int, column: int, values=values, lost=lost) -> str:
            value = values[row, column] / summary.measure.factor
            mean = "" if math.isnan(value) else summary.measure.short(value)
            return f"{mean} ×{lost[row, column]}".strip() if lost[row, column] else mean

        write_cells(axes, values, limits, text, size=8 if columns == 1 else 6.5)
        for condition in summary.ladders[family]:
            if condition.values(summary.choice).size:
                frame_cell(axes, summary.rates.index(condition.lr), summary.ranks.index(condition.rank))
        axes.set_yticks(range(len(summary.rates)), [f"{rate:g}" for rate in summary.rates])
        axes.invert_yaxis()
        axes.set_ylabel("learning rate" if k % columns == 0 else "")
        rank_axis(axes, summary.ranks, pad=0.5)
        if len(maps) > 1:
            axes.set_title(str(family))
    colour_bar(
        figure, panels[0][1], [axes for axes, _ in panels], f"validation {summary.measure.word}{summary.measure.unit}"
    )
    return figure, (
        f"Mean validation {summary.measure.word}{summary.measure.unit} over seeds for every rank and learning rate. "
        "A frame marks the rate "
        f"chosen for that rank; ×n: n seeds {summary.lost} and are not in the mean; empty cells were not run."
    )
