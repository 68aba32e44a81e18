"""Methods side by side."""

from __future__ import annotations

from lorax_kit.report.claims import methods_compared
from lorax_kit.report.conditions import Summary
from lorax_kit.report.figures.marks import Made, methods_used
from lorax_kit.report.plots import QUIET, canvas, family_style


def methods(summary: Summary) -> Made:
    """The metric of every method at its best rank and rate, every seed drawn, the best on validation at the top."""
    compared = methods_compared(summary)
    if compared is None:
        return ""  # most runs have one method: nothing is missing
    measure = summary.measure
    figure = canvas(0.75 + 0.42 * len(compared.conditions))
    axes = figure.add_subplot()
    families = list(summary.ladders)
    names = []
    for line, condition in enumerate(compared.conditions):
        colour, marker = family_style(families.index(condition.family))
        seeds = measure.factor * condition.values(summary.metric)
        axes.plot(seeds, [line + 0.16] * seeds.size, "o", ms=3.2, mew=0, color=colour, alpha=0.5)
        mean, low, high = (measure.factor * x for x in condition.interval(summary.metric)[:3])
        axes.plot([low, high], [line - 0.08] * 2, lw=1.5, color=colour, solid_capstyle="butt")
        axes.plot([mean], [line - 0.08], marker, ms=5.5, mew=0, color=colour)
        names.append(f"{_wrapped(str(condition.family))}\nrank {condition.rank}, rate {condition.lr:g}")
    axes.axvline(measure.factor * compared.reference.mean(summary.metric), color=QUIET, lw=1, ls="--", zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.set_xlabel(f"{summary.label}{measure.unit}")
    return figure, (
        f"{summary.label.capitalize()} of every method at its own best rank and learning rate, both chosen on "
        "validation data, whose best is at the top. Large markers are means over seeds, bars their 95 % intervals "
        f"({methods_used(summary)}), small dots the single seeds; the dashed line is the mean of the reference, "
        f"{compared.reference.family}."
    )


def _wrapped(name: str, width: int = 44) -> str:
    """A long name on two lines, broken at a comma."""
    place = name.rfind(", ", 0, width)
    return name if len(name) <= width or place < 0 else f"{name[: place + 1]}\n{name[place + 2 :]}"
