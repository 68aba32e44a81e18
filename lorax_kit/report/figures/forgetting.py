"""What became of the base: intruder dimensions, and what it forgot of another task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from lorax_kit.analysis.statistics.conditions import interval
from lorax_kit.report.conditions import Condition, Summary
from lorax_kit.report.figures.marks import Made, whose
from lorax_kit.report.measure import Measure
from lorax_kit.report.plots import Axes, canvas, family_style, legend_below, rank_axis
from lorax_kit.report.run_folder import Record

ARMS = {
    "adapter": "trained",
    "random": "same singular values, random directions",
    "spread": "Gaussian of the same norm",
}


def intruders_by_rank(summary: Summary) -> Made:
    """Intruder dimensions of a matrix by rank, beside both controls."""
    records = summary.run.intruders
    if not records:
        return ""
    counts = {arm: _by_rank(summary, records, lambda record, arm=arm: record[arm]) for arm in ARMS}  # type: ignore[misc]
    if not any(values for values in counts["adapter"].values()):
        return "Intruders by rank: none were counted for the chosen conditions."
    figure = canvas(3.0)
    axes = figure.add_subplot()
    for k, (arm, by_rank) in enumerate(counts.items()):
        _draw(axes, summary.ranks, by_rank, k, ARMS[arm], 0.16 * (k - 1))
    rank_axis(axes, summary.ranks)
    top, epsilon = max(record["top"] for record in records), records[0]["epsilon"]
    axes.set_ylabel(f"intruders of {top}")
    axes.set_ylim(bottom=-0.02 * top)
    legend_below(figure, axes, columns=1)
    return figure, (
        f"Intruder dimensions{whose(summary)}: how many of the {top} leading left singular vectors of an adapted "
        f"matrix have a cosine below {epsilon} with every one of the frozen matrix (Shuttleworth et al. 2024), mean "
        "over the adapted matrices, a dot per seed. A trained delta with as many as random directions of the same "
        "singular values learned none of the matrix’s own; a Gaussian of the same norm shows what size alone does."
    )


def forgetting_by_rank(summary: Summary) -> Made:
    """The metric of a held-out task of the base after merging, by rank."""
    records = summary.run.forgetting
    if not records:
        return ""
    by_rank = _by_rank(summary, records, lambda record: record["after"])
    if not any(by_rank.values()):
        return "Forgetting by rank: nothing was measured for the chosen conditions."
    first = records[0]
    measure = Measure(**{name: str(first["metric"][name]) for name in ("name", "better", "format")})
    figure = canvas(3.0)
    axes = figure.add_subplot()
    scaled = {rank: [measure.factor * x for x in values] for rank, values in by_rank.items()}
    _draw(axes, summary.ranks, scaled, 0, "after merging", 0.0)
    before = math.nan if first["before"] is None else first["before"]
    axes.axhline(measure.factor * before, color="#666666", lw=1, ls="--", label="the base")
    rank_axis(axes, summary.ranks)
    axes.set_ylabel(f"{measure.word} on {first['problem']}{measure.unit}")
    axes.margins(y=0.15)
    legend_below(figure, axes)
    part = (
        ""
        if first["adapted"] == first["of"]
        else f" {first['adapted']} of {first['of']} adapted matrices are part of it."
    )
    return figure, (
        f"What the base forgets{whose(summary)}: {measure.word} on the held-out task {first['problem']}, "
        f"{measure.text(before)} before; {measure.highest} is best. Large markers are means over seeds with "
        f"their 95 % intervals.{part}"
    )


def _by_rank(
    summary: Summary, records: Sequence[Record], value: Callable[[Record], float | None]
) -> dict[int, list[float]]:
    """Rank -> a value per seed of the chosen condition, the mean over its records."""

    def seeds(condition: Condition) -> list[float]:
        means = []
        for trial in condition.done:
            own = [value(record) for record in records if record["trial"] == trial["trial"]]
            known = [x for x in own if x is not None]
            means += [float(np.mean(known))] if known else []
        return means

    return {condition.rank: seeds(condition) for condition in summary.ladder}


def _draw(axes: Axes, ranks: Sequence[int], by_rank: dict[int, list[float]], k: int, label: str, shift: float) -> None:
    colour, marker = family_style(k)
    places = {rank: ranks.index(rank) + shift for rank, values in by_rank.items() if values}
    for rank, x in places.items():
        values = by_rank[rank]
        axes.plot([x - 0.06] * len(values), values, "o", ms=3.2, mew=0, color=colour, alpha=0.5)
        spread = interval(values)
        if len(values) > 2:  # of two, an interval is wider than the figure
            axes.plot([x, x], [spread.low, spread.high], lw=1.5, color=colour, solid_capstyle="butt")
    means = [float(np.mean(by_rank[rank])) for rank in places]
    axes.plot(list(places.values()), means, marker + "-", ms=5, lw=0.8, mew=0, color=colour, label=label)
