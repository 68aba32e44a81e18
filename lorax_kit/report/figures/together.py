"""Runs side by side, a figure for each question that they share."""

from __future__ import annotations

import math
from functools import partial

from lorax_kit.report.figures.marks import Made, draw_interval, draw_probe
from lorax_kit.report.figures.pareto import cost_of, pareto_front
from lorax_kit.report.plots import (
    INK,
    QUIET,
    Plot,
    canvas,
    family_style,
    legend_below,
    log_axis,
    rank_axis,
    render,
)
from lorax_kit.report.tables.text import count_text
from lorax_kit.report.together import Together


def draw_together(together: Together) -> tuple[list[Plot], list[str]]:
    """Draw every figure the runs have data for; and a sentence for each figure left out."""
    makers = (metric_by_rank, quality_by_parameters, differences)
    made = [render(maker.__name__, partial(maker, together)) for maker in makers]
    return [m for m in made if isinstance(m, Plot)], [m for m in made if isinstance(m, str)]


def _label(together: Together) -> str:
    return together.sides[0].label


def metric_by_rank(together: Together) -> Made:
    """The metric of every run's chosen conditions by rank."""
    lines = [(k, ladder) for k, side in enumerate(together.sides) for ladder in side.ladders.values()]
    ranks = sorted({c.rank for k, ladder in lines for c in ladder if c.values(together.sides[k].metric).size})
    if not ranks:
        return f"{_label(together).capitalize()} by rank: no adapted trial finished with it."
    measure = together.sides[0].measure
    figure = canvas(3.7)
    axes = figure.add_subplot()
    for place, (k, ladder) in enumerate(lines):
        side, (colour, _) = together.sides[k], family_style(k)
        _, marker = family_style(place)
        known = [c for c in ladder if c.values(side.metric).size]
        aside = (place - (len(lines) - 1) / 2) * 0.6 / len(lines)
        xs = [ranks.index(c.rank) + aside for c in known]
        for x, condition in zip(xs, known, strict=True):
            seeds = measure.factor * condition.values(side.metric)
            axes.plot([x] * seeds.size, seeds, "o", ms=3, mew=0, color=colour, alpha=0.35)
            draw_interval(axes, x, condition, side, colour, marker)
        means = [measure.factor * c.mean(side.metric) for c in known]
        name = together.names[k] + (f": {ladder[0].family}" if len(side.ladders) > 1 else "")
        axes.plot(xs, means, lw=0.8, color=colour, alpha=0.6)
        axes.plot([], [], marker + "-", color=colour, label=name)
    rank_axis(axes, ranks)
    axes.set_ylabel(f"{_label(together)}{measure.unit}")
    axes.margins(y=0.12)
    legend_below(figure, axes, columns=2)
    return figure, (
        f"{_label(together).capitalize()} by rank in every run, each rank at the learning rate that its run chose on "
        "validation data. Markers are means over seeds, bars 95 % intervals, small dots single seeds."
    )


def quality_by_parameters(together: Together) -> Made:
    """The metric of every run against trained parameters, with the front of all."""
    points = [
        (k, place, c)
        for place, (k, ladder) in enumerate(
            (k, ladder) for k, side in enumerate(together.sides) for ladder in side.ladders.values()
        )
        for c in ladder
        if c.values(together.sides[k].metric).size and c.first("params")
    ]
    if len({c.first("params") for _, _, c in points}) < 2:
        return (
            f"{_label(together).capitalize()} against parameters: it takes two finished conditions whose counts differ."
        )
    measure = together.sides[0].measure
    figure = canvas(3.4)
    axes = figure.add_subplot()
    draw_probe(axes, together.sides[0])
    costs = [cost_of(together.sides[k].run, c, "params") for k, _, c in points]
    means = [c.mean(together.sides[k].metric) for k, _, c in points]
    front = pareto_front(costs, means, measure.better)
    axes.plot([costs[i] for i in front], [measure.factor * means[i] for i in front], color=INK, lw=0.8, label="front")
    named: set[int] = set()
    for (k, place, condition), x in zip(points, costs, strict=True):
        colour, marker = family_style(k)[0], family_style(place)[1]
        x *= 1.03 ** (k - (len(together.sides) - 1) / 2)
        draw_interval(axes, x, condition, together.sides[k], colour, marker)
        axes.plot([], [], marker, color=colour, label=None if k in named else together.names[k])
        named.add(k)
    log_axis(axes, "x", costs, count_text)
    axes.set(xlabel="trained parameters (log scale)", ylabel=f"{_label(together)}{measure.unit}")
    axes.margins(y=0.12)
    legend_below(figure, axes, columns=3)
    probe = f" The grey band is the frozen base of {together.names[0]}." if together.sides[0].probe else ""
    return figure, (
        f"{_label(together).capitalize()} against trained parameters. The black line joins the conditions of all runs "
        f"that no other beats in both, by their means alone; runs are drawn 3 % apart.{probe}"
    )


def differences(together: Together) -> Made:
    """The difference of every common condition to the first run's, with its interval."""
    rows = [*together.rows, *([together.best] if together.best else [])]
    cells = [(row, cell) for row in rows for cell in row.cells if cell.difference is not None]
    if not cells:
        return "Differences: no condition of the first run has a counterpart."
    measure = together.sides[0].measure
    figure = canvas(0.8 + 0.3 * len(cells))
    axes = figure.add_subplot()
    axes.axvline(0, color=QUIET, lw=0.9, zorder=0)
    names = []
    for line, (row, cell) in enumerate(cells):
        colour, marker = family_style(cell.side)
        mean, low, high = (measure.factor * x for x in (cell.difference or (math.nan,) * 3)[:3])
        axes.plot([low, high], [line] * 2, lw=1.5, color=colour, solid_capstyle="butt")
        axes.plot([mean], [line], marker, ms=5, color=colour, mfc=colour if cell.pairs else "white")
        what = f"rank {row.rank}" if together.by_rank else f"{row.setting}, rank {row.rank}"
        what = row.setting if row is together.best else what
        names.append(what + (f": {together.names[cell.side]}" if len(together.names) > 2 else ""))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.set_xlabel(f"{_label(together)}: difference to {together.names[0]}{', points' if measure.share else ''}")
    better = "right" if measure.better == "higher" else "left"
    return figure, (
        f"Differences in {_label(together)} to the same condition of {together.names[0]}; to the {better} of zero is "
        "better. Filled marks are paired by seed, hollow ones differences of means of independent runs; bars are 95 % "
        "intervals, not corrected for their number."
    )
