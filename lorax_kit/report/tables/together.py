"""The conditions that runs have in common, as cells and as text for a terminal."""

from __future__ import annotations

import math

from lorax_kit.report.tables.summary import seeds_text
from lorax_kit.report.tables.text import p_text
from lorax_kit.report.together import Cell, Row, Together


def together_table(together: Together) -> str:
    """The conditions in common as aligned plain text."""
    first = together.sides[0]
    heads = {
        "setting": "setting",
        "run": "run",
        "rank": "rank",
        "rate": "lr",
        "seeds": "seeds",
        "metric": f"{first.label} (95 %)",
        "difference": f"vs {together.names[0]}",
        "p": "p (Holm)",
        "paired": "",
    }
    rows = together_rows(together)
    best = [row for row in rows if row["best"]]
    widths = {key: max(len(head), *(len(row[key]) for row in rows)) for key, head in heads.items()} if rows else {}

    def line(cells: dict[str, str]) -> str:
        words = ("setting", "run")
        return "  ".join(
            cells[key].ljust(width) if key in words else cells[key].rjust(width) for key, width in widths.items()
        ).rstrip()

    lines = [" beside ".join(together.names)]
    lines += [f"{section}: {name}: {' | '.join(map(_short, texts))}" for section, name, texts in together.differing]
    if not rows:
        return "\n".join([*lines, "no condition in common has finished"])
    lines += [line(heads), *(line(row) for row in rows if not row["best"])]
    return "\n".join([*lines, *(["the best of each run:", *map(line, best)] if best else [])])


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def together_rows(together: Together) -> list[dict[str, str]]:
    """Formatted cells, one per condition and run: setting, rank, run, rate, seeds, metric, difference, p, paired."""
    rows = [*together.rows, *([together.best] if together.best else [])]
    return [_cells(together, row, cell) for row in rows for cell in row.cells]


def _cells(together: Together, row: Row, cell: Cell) -> dict[str, str]:
    side, condition = together.sides[cell.side], cell.condition
    measure, gap, difference = side.measure, cell.difference, ""
    if gap is not None:
        difference = measure.signed(gap.mean)
        if not math.isnan(gap.low):
            difference += f" [{measure.signed(gap.low)}, {measure.signed(gap.high)}]"
    first = cell is row.cells[0]
    setting = str(condition.family) if together.by_rank or row is together.best else row.setting
    return {
        "first": "yes" if first else "",
        "best": "yes" if row is together.best else "",
        "setting": setting,
        "rank": str(condition.rank),
        "run": together.names[cell.side],
        "rate": f"{condition.lr:g}",
        "seeds": seeds_text(condition),
        "metric": measure.interval(condition.interval(side.metric), short=True),
        "difference": difference,
        "p": "" if first else p_text(cell.p_holm),
        "paired": "" if first else f"{cell.pairs} pairs" if cell.pairs else "unpaired",
    }
