"""What the trained deltas look like: singular values, effective ranks, and the subspaces that ranks share."""

from __future__ import annotations

import math

import numpy as np

from lorax_kit.report.conditions import Summary
from lorax_kit.report.figures.marks import Made, whose
from lorax_kit.report.figures.series import effective_ranks, mean_overlaps, mean_spectra, short_names
from lorax_kit.report.plots import (
    canvas,
    colour_bar,
    heat_map,
    log_values,
    numbered,
    rank_axis,
    rank_colour,
    write_cells,
)


def singular_values(summary: Summary) -> Made:
    """Singular values of the deltas by index, for each rank of the best family."""
    spectra = [(c.rank, list(mean_spectra(summary.run, c).values())) for c in summary.ladder]
    spectra = [(rank, sites) for rank, sites in spectra if sites]
    if not spectra:
        return "Singular values: no spectra were recorded for the chosen conditions."
    figure = canvas(3.0)
    axes = figure.add_subplot()
    for rank, sites in spectra:
        colour = rank_colour(rank, summary.ranks)
        for values in sites:
            axes.plot(range(1, len(values) + 1), values, lw=0.5, color=colour, alpha=0.3)
        shortest = min(map(len, sites))
        mean = np.mean([values[:shortest] for values in sites], axis=0)
        # Shorter lines in front: where ranks agree, the end of each stays visible.
        style = {"ms": 3.5, "lw": 1.6, "color": colour, "label": f"rank {rank}", "zorder": 3 + 1 / rank}
        axes.plot(range(1, shortest + 1), mean, "o-", **style)
    scale = "log" if any((values > 0).any() for _, sites in spectra for values in sites) else "linear"
    axes.set(xlabel="index of the singular value", ylabel=f"singular value of the delta ({scale} scale)")
    if scale == "log":
        log_values(axes)
    numbered(axes, max(len(values) for _, sites in spectra for values in sites))
    axes.legend(ncols=2 if len(spectra) > 5 else 1)
    return figure, (
        f"Singular values of the trained deltas{whose(summary)}, scale included, largest first. Thin lines are "
        "single sites (mean over seeds), thick lines the mean over sites. A steep fall: a smaller rank would hold most "
        "of this delta, which is not to say that training at that rank finds it."
    )


def effective_rank_by_site(summary: Summary) -> Made:
    """Effective rank of the delta, site by rank."""
    sites, ranks, values = effective_ranks(summary)
    if not sites:
        return "Effective rank by site: no spectra were recorded for the chosen conditions."
    limits = (1.0, max(float(np.nanmax(values)), 1.1))
    figure = canvas(min(9.5, 0.19 * len(sites) + 1.1))
    axes = figure.add_subplot()
    image = heat_map(axes, values, limits)
    every = math.ceil(len(sites) / 48)  # more rows than that leave no room for text
    if every == 1:

        def text(row: int, column: int) -> str:
            return "" if math.isnan(values[row, column]) else f"{values[row, column]:.1f}"

        write_cells(axes, values, limits, text, size=7)
    axes.set_yticks(range(0, len(sites), every), short_names(sites)[::every], fontsize=7)
    rank_axis(axes, ranks, pad=0.5)
    colour_bar(figure, image, [axes], "effective rank")
    return figure, (
        f"Effective rank of each site's delta{whose(summary)}: exp of the entropy of its normalised singular values "
        "(Roy & Vetterli 2007), mean over seeds. Near the trained rank, all directions carry weight; far below "
        "it, few do."
    )


MAPS = 9


def overlap_by_rank(summary: Summary) -> Made:
    """How much of the leading directions two ranks share, a map per pair of ranks."""
    if not summary.run.overlaps:
        return ""  # no run folder need have them
    maps = mean_overlaps(summary)
    if not maps:
        return "Overlap by rank: none were recorded for the chosen conditions."
    shown = list(maps.items())[-MAPS:]  # the largest ranks have the most to show
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = canvas(2.3 * rows + 0.3)
    panels = []
    for place, ((one, other), phi) in enumerate(shown, 1):
        axes = figure.add_subplot(rows, columns, place)
        panels.append((axes, heat_map(axes, phi, (0.0, 1.0))))
        for which, count in (("x", phi.shape[1]), ("y", phi.shape[0])):
            ticks = range(0, count, max(1, math.ceil(count / 8)))
            axes.set(**{f"{which}ticks": ticks, f"{which}ticklabels": [str(tick + 1) for tick in ticks]})
        axes.set(xlabel=f"directions of rank {other}", ylabel=f"directions of rank {one}")
    colour_bar(figure, panels[0][1], [axes for axes, _ in panels], "overlap")
    left = f" Of {len(maps)} pairs of ranks the last {MAPS} are shown." if len(maps) > MAPS else ""
    return figure, (
        f"Overlap of the subspaces of two ranks{_of_same(shown)}{whose(summary)}: |U_i^T V_j|_F^2 / min(i, j) of their "
        "leading i and j directions (Hu et al. 2021), mean over sites and pairs of seeds. 1: the smaller lies within "
        "the larger; random subspaces of d dimensions share max(i, j) / d. Ranks of one seed may start from the same "
        f"draws, so that part of what they share was never learned; two seeds do not.{left}"
    )


def _of_same(shown: list[tuple[tuple[int, int], np.ndarray]]) -> str:
    """Where a rank is beside itself, its seeds are."""
    return " (of one rank: of two seeds)" if any(one == other for (one, other), _ in shown) else ""
