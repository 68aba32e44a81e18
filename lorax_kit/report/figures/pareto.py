"""Quality against cost: what each condition reaches and what it takes, and the front that no other beats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lorax_kit.report.conditions import Condition, Summary
from lorax_kit.report.figures.marks import Made, choice, draw_interval, draw_probe, methods_used
from lorax_kit.report.plots import INK, QUIET, Axes, canvas, family_style, legend_below, log_axis, value_axis
from lorax_kit.report.run_folder import RunFolder
from lorax_kit.report.tables.text import bytes_text, count_text

COSTS: dict[str, tuple[str, Callable[[float], str], bool]] = {
    "params": ("trained parameters", count_text, True),
    "adapter_bytes": ("adapter on disk", bytes_text, True),
    "train_seconds": ("training time of a trial, s", "{:g}".format, False),
    "memory": ("memory of a stacked trial", bytes_text, False),
}
"""Cost -> label, how values are written, whether the axis is logarithmic."""


def pareto_front(costs: Sequence[float], values: Sequence[float], better: str) -> list[int]:
    """The points that no other beats in both, from the cheapest on; not finite ones are never among them.

    Args:
      costs: (n,), lower is better.
      values: (n,), better "higher" or "lower".

    Returns:
      Indices.

    Example:
      >>> pareto_front([1, 2, 3, 3], [0.7, 0.6, 0.8, 0.9], "higher")
      [0, 3]
    """
    sign = 1 if better == "higher" else -1
    points = [i for i, point in enumerate(zip(costs, values, strict=True)) if all(map(math.isfinite, point))]
    kept: list[int] = []
    for i in sorted(points, key=lambda i: (costs[i], -sign * values[i])):
        if not kept or sign * values[i] > sign * values[kept[-1]]:
            kept.append(i)
    return kept


def cost_of(run: RunFolder, condition: Condition, cost: str) -> float:
    """A cost of a condition, the mean over its seeds; nan where it was not recorded.

    Memory is a trial's share of the temporaries of the program that trained its group, among those that it computes
    side by side ("at_once"), where the groups of `study.json` name their trials ("names").
    """
    if cost != "memory":
        return condition.mean(cost) if cost == "train_seconds" else condition.first(cost) or math.nan
    shares = []
    for group in run.study.get("groups") or ():
        names = set(group.get("names") or ())
        at_once = group.get("at_once") or group.get("size")
        if group.get("temp_bytes") and at_once:
            shares += [group["temp_bytes"] / at_once for trial in condition.done if trial["trial"] in names]
    return sum(shares) / len(shares) if shares else math.nan


def quality_by_cost(summary: Summary) -> Made:
    """The metric against every recorded cost that differs among the chosen conditions, with the front of each."""
    measure = summary.measure
    ladders = {
        family: [c for c in ladder if c.values(summary.metric).size] for family, ladder in summary.ladders.items()
    }
    chosen = [c for ladder in ladders.values() for c in ladder]
    means = [c.mean(summary.metric) for c in chosen]
    panels = {cost: [cost_of(summary.run, c, cost) for c in chosen] for cost in COSTS}
    panels = {cost: xs for cost, xs in panels.items() if len({x for x in xs if math.isfinite(x)}) > 1}
    if not panels:
        return f"{summary.label.capitalize()} against costs: it takes two finished conditions whose costs differ."
    rows, columns = math.ceil(len(panels) / 2), min(2, len(panels))
    figure = canvas(0.4 + 2.6 * rows)
    drawn: list[Axes] = []
    for place, (cost, xs) in enumerate(panels.items(), 1):
        label, text, log = COSTS[cost]
        axes = figure.add_subplot(rows, columns, place, sharey=drawn[0] if drawn else None)
        drawn.append(axes)
        draw_probe(axes, summary)
        front = pareto_front(xs, means, measure.better)
        line = [xs[i] for i in front], [measure.factor * means[i] for i in front]
        axes.plot(*line, color=INK, lw=0.8, zorder=1, label="front" if place == 1 else None)
        for i in front:
            style: dict[str, Any] = {"fontsize": 7, "color": QUIET, "textcoords": "offset points"}
            axes.annotate(f"{chosen[i].rank}", (line[0][front.index(i)], line[1][front.index(i)]), (6, -9), **style)
        widest = max(x for x in xs if math.isfinite(x))
        for k, (family, ladder) in enumerate(ladders.items()):
            colour, marker = family_style(k)
            aside = k - (len(ladders) - 1) / 2  # families of equal cost would hide each other
            for condition in ladder:
                x = xs[chosen.index(condition)]
                x = x * 1.05**aside if log else x + 0.012 * widest * aside
                if math.isfinite(x):
                    draw_interval(axes, x, condition, summary, colour, marker)
            axes.plot([], [], marker, color=colour, label=str(family) if len(ladders) > 1 else None)
        finite = [x for x in xs if math.isfinite(x)]
        if log:
            log_axis(axes, "x", finite, text, most=7 if columns == 1 else 4)
        else:
            value_axis(axes, finite, text)
        axes.set_xlabel(label + (" (log scale)" if log else ""))
        if place % columns == 1 or columns == 1:
            axes.set_ylabel(f"{summary.label}{measure.unit}")
        else:
            axes.tick_params(labelleft=False)
        axes.margins(y=0.12)
    legend_below(figure, drawn[0], columns=2 if len(ladders) > 1 else 3)
    beside = " Settings are drawn a little aside of each other, so that equal costs do not hide them."
    memory = " Memory is a trial's share of the temporaries of the program that trains its group."
    return figure, (
        f"{summary.label.capitalize()} against what it costs. Points are means over seeds, bars 95 % intervals "
        f"({methods_used(summary)}); the black line, with ranks beside it, joins those that no other beats in both, "
        f"by their means alone.{choice(summary)}{beside * (len(ladders) > 1)}{memory * ('memory' in panels)}"
    )
