"""Plots of the step benchmark: ratios with their spread, and the roofline."""

from __future__ import annotations

from typing import Any

from lorax_kit.report.plots import (
    MARKERS,
    OKABE_ITO,
    QUIET,
    Figure,
    Plot,
    canvas,
    legend_below,
    log_axis,
    log_values,
    render,
)

AGAINST = {"full": "full fine-tuning", "naive": "textbook LoRA", "peft": "PEFT on torch"}
STEPS = {"full": "full fine-tuning", "naive": "textbook LoRA", "ours": "lorax_kit"}


def step_plots(rows: list[dict[str, Any]]) -> list[Plot]:
    """The plots of the rows of `lorax-kit bench step`."""
    plots = [render("steps", lambda: _ratios(rows)), render("roofline", lambda: _roofline(rows))]
    return [plot for plot in plots if isinstance(plot, Plot)]


def _name(row: dict[str, Any]) -> str:
    shape = f"{row['width']} wide x {row['layers']}, {row['batch_size']}x{row['length']} tokens, r={row['rank']}"
    return shape if row["targets"] == "all-linear" else f"{shape}, {row['targets']}"


def _ratios(rows: list[dict[str, Any]]) -> tuple[Figure, str]:
    figure = canvas(1.1 + 0.34 * len(rows))
    axes = figure.add_subplot()
    for i, (key, label) in enumerate(AGAINST.items()):
        places, shown = [], []
        for line, row in enumerate(rows):
            if row[f"ratio_{key}"] is not None:
                places.append(line + 0.2 * (i - 1))
                shown.append((row[f"ratio_{key}"], *row[f"spread_{key}"]))
        style: dict[str, Any] = {"fmt": MARKERS[i], "color": OKABE_ITO[i], "markersize": 4, "linewidth": 1.2}
        if shown:
            low, high = [[m - a for m, a, _ in shown], [b - m for m, _, b in shown]]
            spread = [[max(x, 0) for x in low], [max(x, 0) for x in high]]
            axes.errorbar([m for m, _, _ in shown], places, xerr=spread, label=f"against {label}", **style)
    axes.axvline(1, color=QUIET, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_name(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.set_xlim(left=0)
    axes.set_xlabel("time of our step / time of the other: medians and quartiles of alternating rounds")
    legend_below(figure, axes)
    device = rows[0]["device"]
    return figure, f"A training step of lorax_kit against three others on one {device}. Left of 1 is faster."


def _roofline(rows: list[dict[str, Any]]) -> tuple[Figure, str]:
    figure = canvas(3.4)
    axes = figure.add_subplot()
    peak, bandwidth = (max(row[name] for row in rows) for name in ("peak_gflops", "peak_gbytes"))
    intensities = []
    for i, (step, label) in enumerate(STEPS.items()):
        x = [row[f"{step}_flops"] / row[f"{step}_bytes"] for row in rows]
        intensities += x
        y = [row[f"{step}_gflops"] for row in rows]
        axes.plot(x, y, MARKERS[i], color=OKABE_ITO[i], markersize=4.5, label=label)
    ends = [min(*intensities, peak / bandwidth) / 1.5, max(*intensities, peak / bandwidth) * 1.5]
    roof = [ends[0], peak / bandwidth, ends[1]]
    axes.plot(roof, [min(peak, bandwidth * x) for x in roof], color=QUIET, linewidth=1.2, label="measured roof")
    axes.set(xlabel="FLOPs per byte of the compiled program", ylabel="GFLOP/s")
    log_values(axes)
    steps = [n * 10**power for power in range(-2, 5) for n in (1, 2, 5)]
    log_axis(axes, "x", [x for x in steps if ends[0] <= x <= ends[1]], lambda x: f"{x:g}")
    axes.set_xlim(*ends)
    legend_below(figure, axes)
    caption = (
        f"Roofline: a {peak:.0f} GFLOP/s product (2048 x 2048) and a {bandwidth:.0f} GB/s copy, measured in the same "
        "rounds. Bytes are those of every operation: caches make more of them."
    )
    return figure, caption
