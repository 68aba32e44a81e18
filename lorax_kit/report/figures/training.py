"""Losses by step."""

from __future__ import annotations

import numpy as np

from lorax_kit.report.conditions import Summary
from lorax_kit.report.figures.marks import Made, choice, whose
from lorax_kit.report.figures.series import BINS, binned_curves
from lorax_kit.report.plots import Axes, canvas, legend_below, rank_colour, whole_numbers


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
        f"Losses by step for each rank{whose(summary)}.{choice(summary)} Thick lines are means over the seeds that "
        f"ran to the end, thin lines single seeds. Losses of more than {BINS} steps are averaged within {BINS} equal "
        "stretches of steps." + (" The vertical axes differ." if len(panels) > 1 else "")
    )
