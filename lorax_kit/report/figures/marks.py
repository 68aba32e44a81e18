"""Marks and phrases that several figures share."""

from __future__ import annotations

import math

from lorax_kit.report.conditions import Condition, Summary
from lorax_kit.report.plots import QUIET, Axes, Figure

Made = tuple[Figure, str] | str
"""A figure and its caption, or a sentence that says why there is nothing to draw."""


def draw_interval(axes: Axes, x: float, condition: Condition, summary: Summary, colour: str, marker: str) -> None:
    """Draw the mean of a condition and its interval at `x`."""
    mean, low, high = (summary.measure.factor * x for x in condition.interval(summary.metric)[:3])
    if not math.isnan(low):
        axes.plot([x, x], [low, high], lw=1.5, color=colour, solid_capstyle="butt")
    axes.plot([x], [mean], marker, ms=5, color=colour, mew=0)


def draw_probe(axes: Axes, summary: Summary) -> None:
    """Draw the probe's mean as a line and its interval as a band."""
    if summary.probe is None or not summary.probe.values(summary.metric).size:
        return
    mean, low, high = (summary.measure.factor * x for x in summary.probe.interval(summary.metric)[:3])
    if not math.isnan(low):
        axes.axhspan(low, high, color="#bbbbbb", alpha=0.45, lw=0)
    axes.axhline(mean, color=QUIET, lw=1, ls="--", label="frozen base, trained head")


def methods_used(summary: Summary) -> str:
    """How the intervals of the chosen conditions were made."""
    used = {c.interval(summary.metric).method for ladder in summary.ladders.values() for c in ladder}
    return "; ".join(sorted(used - {"no finished trial"})) or "none"


def whose(summary: Summary) -> str:
    """The family that a figure of one ladder shows, where the run has several."""
    return f" ({summary.ladder[0].family})" if len(summary.ladders) > 1 else ""


def choice(summary: Summary) -> str:
    """How the rate of each rank was chosen, where several were tried."""
    if len(summary.rates) < 2:
        return ""
    return f" Each rank is shown at the learning rate with its best mean validation {summary.measure.word}."
