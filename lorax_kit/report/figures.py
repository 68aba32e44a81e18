"""The figures of a report, one function each: data from a `Summary`, canvas from `plots`.

Each returns the figure and its caption, or a sentence saying why there is nothing to draw. A figure carries
its labels and units and can be used alone; the caption says what is shown and how intervals were made.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from lorax_kit.report.conditions import Condition, Summary
from lorax_kit.report.plots import (
    QUIET,
    Axes,
    Figure,
    Plot,
    canvas,
    colour_bar,
    family_style,
    frame_cell,
    heat_map,
    legend_below,
    log_axis,
    log_values,
    numbered,
    rank_axis,
    rank_colour,
    render,
    whole_numbers,
    write_cells,
)
from lorax_kit.report.series import BINS, binned_curves, effective_ranks, mean_spectra, rate_map, short_names
from lorax_kit.report.tables import bytes_text, count_text

Made = tuple[Figure, str] | str


def draw(summary: Summary) -> tuple[list[Plot], list[str]]:
    """Draw every figure the run has data for.

    Returns:
      The plots in reading order, and one sentence for each figure left out saying why.
    """
    made = [render(maker.__name__, partial(maker, summary)) for maker in FIGURES]
    return [m for m in made if isinstance(m, Plot)], [m for m in made if isinstance(m, str)]


def metric_by_rank(summary: Summary) -> Made:
    """The metric of the chosen condition of each rank, per family, every seed drawn."""
    if not any(c.values(summary.metric).size for ladder in summary.ladders.values() for c in ladder):
        return f"{summary.label.capitalize()} by rank: no adapted trial finished with it."
    figure = canvas(3.7)
    axes = figure.add_subplot()
    _probe_band(axes, summary)
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
            _interval(axes, x + shift, condition, summary, colour, marker)
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
        f"intervals ({_methods(summary)}), small dots the single seeds.{_choice(summary)}"
    )
    if summary.probe is not None and summary.probe.values(summary.metric).size:
        caption += " The grey band is the frozen encoder with a trained head (mean and 95 % interval)."
    if any(len(c.done) < len(c.trials) for ladder in summary.ladders.values() for c in ladder):
        caption += " ×n: n seeds diverged and are not in the mean."
    return figure, caption


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
    _probe_band(axes, summary)
    for k, (family, ladder) in enumerate(ladders.items()):
        colour, marker = family_style(k)
        for condition in ladder:
            x, y = spot(condition, k), summary.measure.factor * condition.mean(summary.metric)
            _interval(axes, x, condition, summary, colour, marker)
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
        f"seeds, bars 95 % intervals ({_methods(summary)}).{_choice(summary)}"
        + (" Settings are drawn 3 % apart, so that equal counts do not hide each other." if len(ladders) > 1 else "")
    )


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
        "chosen for that rank; ×n: n seeds diverged and are not in the mean; empty cells were not run."
    )


def loss_curves(summary: Summary) -> Made:
    """Training and validation loss by step, for the chosen conditions of the best family."""
    ladder = [*([summary.probe] if summary.probe else []), *summary.ladder]
    names = {"loss": "training loss", "val_loss": "validation loss"}
    panels = {key: [(c, binned_curves(summary.run, c, key)) for c in ladder] for key in names}
    panels = {key: lines for key, lines in panels.items() if any(seeds for _, seeds in lines)}
    if not panels:
        return "Loss curves: none were logged for the chosen conditions."
    figure = canvas(3.3)
    shown: list[Axes] = []
    for position, (key, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), position)
        shown.append(axes)
        for condition, seeds in lines:
            if not seeds:
                continue
            colour, dash = rank_colour(condition.rank, summary.ranks), "-" if condition.rank else "--"
            for steps, losses in seeds:
                axes.plot(steps, losses, dash, lw=0.5, color=colour, alpha=0.35)
            longest = max((steps for steps, _ in seeds), key=len)
            mean = np.mean([losses for steps, losses in seeds if len(steps) == len(longest)], axis=0)
            marker = "o" if len(longest) < 12 else ""
            name = f"rank {condition.rank}" if condition.rank else "probe"
            axes.plot(longest, mean, dash, marker=marker, ms=3, lw=1.7, color=colour, label=name)
        axes.set(xlabel="step", ylabel=names[key])
        whole_numbers(axes, 5)
    legend_below(figure, shown[0], columns=7)
    return figure, (
        f"Losses by step for each rank{_whose(summary)}.{_choice(summary)} Thick lines are means over the seeds that "
        f"ran to the end, thin lines single seeds. Losses of more than {BINS} steps are averaged within {BINS} equal "
        "stretches of steps." + (" The vertical axes differ." if len(panels) > 1 else "")
    )


def singular_values(summary: Summary) -> Made:
    """Singular values of the deltas by index, for each rank of the best family."""
    found = [(c.rank, list(mean_spectra(summary.run, c).values())) for c in summary.ladder]
    found = [(rank, sites) for rank, sites in found if sites]
    if not found:
        return "Singular values: no spectra were recorded for the chosen conditions."
    figure = canvas(3.0)
    axes = figure.add_subplot()
    for rank, sites in found:
        colour = rank_colour(rank, summary.ranks)
        for values in sites:
            axes.plot(range(1, len(values) + 1), values, lw=0.5, color=colour, alpha=0.3)
        shortest = min(map(len, sites))
        mean = np.mean([values[:shortest] for values in sites], axis=0)
        # Shorter lines in front: where ranks agree, the end of each stays visible.
        style = {"ms": 3.5, "lw": 1.6, "color": colour, "label": f"rank {rank}", "zorder": 3 + 1 / rank}
        axes.plot(range(1, shortest + 1), mean, "o-", **style)
    scale = "log" if any((values > 0).any() for _, sites in found for values in sites) else "linear"
    axes.set(xlabel="index of the singular value", ylabel=f"singular value of the delta ({scale} scale)")
    if scale == "log":
        log_values(axes)
    numbered(axes, max(len(values) for _, sites in found for values in sites))
    axes.legend(ncols=2 if len(found) > 5 else 1)
    return figure, (
        f"Singular values of the trained deltas{_whose(summary)}, scale included, largest first. Thin lines are "
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
        f"Effective rank of each site's delta{_whose(summary)}: exp of the entropy of its normalised singular values "
        "(Roy & Vetterli 2007), mean over seeds. Near the trained rank, all directions carry weight; far below "
        "it, few do."
    )


FIGURES = (
    metric_by_rank,
    metric_by_parameters,
    cost_by_rank,
    rate_by_rank,
    loss_curves,
    singular_values,
    effective_rank_by_site,
)


def _interval(axes: Axes, x: float, condition: Condition, summary: Summary, colour: str, marker: str) -> None:
    mean, low, high = (summary.measure.factor * x for x in condition.interval(summary.metric)[:3])
    if not math.isnan(low):
        axes.plot([x, x], [low, high], lw=1.5, color=colour, solid_capstyle="butt")
    axes.plot([x], [mean], marker, ms=5, color=colour, mew=0)


def _probe_band(axes: Axes, summary: Summary) -> None:
    if summary.probe is None or not summary.probe.values(summary.metric).size:
        return
    mean, low, high = (summary.measure.factor * x for x in summary.probe.interval(summary.metric)[:3])
    if not math.isnan(low):
        axes.axhspan(low, high, color="#bbbbbb", alpha=0.45, lw=0)
    axes.axhline(mean, color=QUIET, lw=1, ls="--", label="frozen encoder, trained head")


def _methods(summary: Summary) -> str:
    used = {c.interval(summary.metric).method for ladder in summary.ladders.values() for c in ladder}
    return "; ".join(sorted(used - {"no finished trial"})) or "none"


def _whose(summary: Summary) -> str:
    """The family that a figure of one ladder shows, where the run has several."""
    return f" ({summary.ladder[0].family})" if len(summary.ladders) > 1 else ""


def _choice(summary: Summary) -> str:
    if len(summary.rates) < 2:
        return ""
    return f" Each rank is shown at the learning rate with its best mean validation {summary.measure.word}."
