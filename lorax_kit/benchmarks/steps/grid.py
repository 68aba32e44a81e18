"""The step benchmark over widths, tokens and ranks."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorax_kit.benchmarks.steps.step import COLUMNS, bench_step

# (width, layers, batch_size, length, rank, targets): the sizes that the README reports, then each knob alone.
GRID: tuple[tuple[int, int, int, int, int, str], ...] = (
    (384, 6, 8, 128, 8, "all-linear"),
    (384, 6, 8, 128, 8, "qv"),
    (768, 6, 4, 256, 8, "all-linear"),
    (128, 6, 8, 128, 8, "all-linear"),
    (2048, 1, 4, 128, 8, "all-linear"),
    (384, 2, 2, 128, 8, "all-linear"),
    (384, 2, 32, 128, 8, "all-linear"),
    (384, 1, 64, 128, 8, "all-linear"),
    (384, 2, 8, 128, 1, "all-linear"),
    (384, 2, 8, 128, 64, "all-linear"),
    (384, 2, 8, 128, 256, "all-linear"),
    (768, 2, 2, 128, 64, "all-linear"),
    (256, 6, 8, 128, 8, "all-linear"),
)


def bench_grid(
    out: str | Path | None, *, rounds: int, grid: Sequence[tuple[int, int, int, int, int, str]] = GRID, **options: Any
) -> list[dict[str, Any]]:
    """A row per point of the grid; after each, the files under `out` hold what is there."""
    rows: list[dict[str, Any]] = []
    for width, layers, batch_size, length, rank, targets in grid:
        sizes: dict[str, Any] = {"width": width, "layers": layers, "batch_size": batch_size, "length": length}
        rows.append(bench_step(**sizes, rank=rank, targets=targets, rounds=rounds, forms=True, **options))
        if out is not None:
            write_rows(Path(out), rows)
    return rows


def write_rows(out: Path, rows: list[dict[str, Any]]) -> None:
    """`steps.json` with everything, `steps.csv` with the table's columns, and the plots `steps.svg`, `roofline.svg`."""
    from lorax_kit.benchmarks.plots import step_plots

    out.mkdir(parents=True, exist_ok=True)
    (out / "steps.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    with (out / "steps.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    for plot in step_plots(rows):
        (out / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
        (out / f"{plot.name}.png").write_bytes(plot.png)
