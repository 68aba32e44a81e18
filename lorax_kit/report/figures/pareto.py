"""Quality against cost."""

from __future__ import annotations

from lorax_kit.report.conditions import Condition, Summary
from lorax_kit.report.figures.marks import Made, choice, draw_interval, draw_probe, methods_used
from lorax_kit.report.plots import QUIET, canvas, family_style, legend_below, log_axis
from lorax_kit.report.tables.text import count_text


def metric_by_parameters(summary: Summary) -> Made:
    """The metric against the number of trained parameters, ranks written beside the points."""
    ladders = {
        family: [c for c in ladder if c.first("params") and c.values(summary.metric).size]
        for family, ladder in summary.ladders.items()
    }
    if sum(map(len, ladders.values())) < 2:
        return f"{summary.label.capitalize()} against parameters: it takes two finished conditions that have both."

    def spot(condition: Condition, k: int) -> float:
        """Families of equal counts would hide each other: drawn 3 % apart."""
        return (condition.first("params") or 0) * 1.03 ** (k - (len(ladders) - 1) / 2)

    figure = canvas(3.4)
    axes = figure.add_subplot()
    draw_probe(axes, summary)
    for k, (family, ladder) in enumerate(ladders.items()):
        colour, marker = family_style(k)
        for condition in ladder:
            x, y = spot(condition, k), summary.measure.factor * condition.mean(summary.metric)
            draw_interval(axes, x, condition, summary, colour, marker)
            if len(ladders) == 1:
                name = f"r = {condition.rank}"
                axes.annotate(name, (x, y), xytext=(6, -10), textcoords="offset points", color=QUIET)
        means = [summary.measure.factor * c.mean(summary.metric) for c in ladder]
        label = str(family) if len(ladders) > 1 else None
        axes.plot([spot(c, k) for c in ladder], means, lw=0.8, color=colour, alpha=0.6)
        axes.plot([], [], marker + "-", color=colour, label=label)
    log_axis(axes, "x", [c.first("params") or 0 for ladder in ladders.values() for c in ladder], count_text)
    axes.set(xlabel="trained parameters (log scale)", ylabel=f"{summary.label}{summary.measure.unit}")
    axes.margins(y=0.12)
    legend_below(figure, axes, columns=2 if len(ladders) > 1 else 1)
    return figure, (
        f"{summary.label.capitalize()} against the number of trained parameters. Points are means over "
        f"seeds, bars 95 % intervals ({methods_used(summary)}).{choice(summary)}"
        + (" Settings are drawn 3 % apart, so that equal counts do not hide each other." if len(ladders) > 1 else "")
    )
