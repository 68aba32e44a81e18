"""What the experiments beside it share: the rate that validation chooses, and tables as CSV and lines."""

import csv
from collections.abc import Callable, Iterable
from pathlib import Path

from lorax_kit.analysis.statistics.conditions import interval


def at_best_rate(rows: Iterable[dict], metric: str = "val_accuracy", better: Callable = max) -> list[dict]:
    """The trials, by seed, of the learning rate whose mean validation is best; one where a trial failed is not."""
    by_rate: dict[float, list[dict]] = {}
    for row in rows:
        by_rate.setdefault(row["lr"], []).append(row)
    means = {
        lr: sum(row[metric] for row in some) / len(some)
        for lr, some in sorted(by_rate.items())
        if all(row.get(metric) is not None for row in some)
    }
    return sorted(by_rate[better(means, key=means.__getitem__)], key=lambda row: row["seed"])


def spread(values: Iterable[float], name: str = "mean") -> dict[str, float]:
    """A mean over seeds and its 95 % interval, as columns."""
    found = interval(list(values))
    before = "" if name == "mean" else f"{name}_"
    return {name: found.mean, f"{before}low": found.low, f"{before}high": found.high}


def against(values: Iterable[float], others: Iterable[float]) -> dict[str, float]:
    """The mean difference, paired by seed, and its 95 % interval."""
    return spread([x - y for x, y in zip(values, others, strict=True)], "difference")


def write(file: Path, rows: list[dict]) -> None:
    """Write a CSV of rows with some columns missing, and print them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print({name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()})
