"""The figures of a report, one function each: data from a `Summary`, canvas from `plots`.

Each returns the figure and its caption, or a sentence saying why there is nothing to draw. A figure carries
its labels and units and can be used alone; the caption says what is shown and how intervals were made.
"""

from functools import partial

from lorax_kit.report.conditions import Summary
from lorax_kit.report.figures.by_rank import cost_by_rank, metric_by_rank, rate_by_rank
from lorax_kit.report.figures.deltas import effective_rank_by_site, overlap_by_rank, singular_values
from lorax_kit.report.figures.forgetting import forgetting_by_rank, intruders_by_rank
from lorax_kit.report.figures.methods import methods
from lorax_kit.report.figures.pareto import quality_by_cost
from lorax_kit.report.figures.training import loss_curves
from lorax_kit.report.plots import Plot, render

STALE = ("metric_by_parameters",)
"""Figures of earlier versions, whose files are removed."""
FIGURES = (
    metric_by_rank,
    methods,
    quality_by_cost,
    cost_by_rank,
    rate_by_rank,
    loss_curves,
    singular_values,
    effective_rank_by_site,
    overlap_by_rank,
    intruders_by_rank,
    forgetting_by_rank,
)


def draw(summary: Summary) -> tuple[list[Plot], list[str]]:
    """Draw every figure the run has data for.

    Returns:
      The plots in reading order, and one sentence for each figure left out saying why.
    """
    made = [render(maker.__name__, partial(maker, summary)) for maker in FIGURES]
    return [m for m in made if isinstance(m, Plot)], [m for m in made if isinstance(m, str) and m]
