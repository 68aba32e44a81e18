"""Rows within a budget of seconds: each is written as soon as it is measured, and what does not fit says so."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from time import perf_counter
from typing import Any, NamedTuple

from lorax_kit.benchmarks.torch_peer import release


class Row(NamedTuple):
    """Something to measure.

    Attributes:
      kind: what the row is of.
      about: which one, for a row that is skipped.
      seconds: that it takes on a card of today, estimated.
      measure: yields one or several rows, of this kind unless they say another.
    """

    kind: str
    about: dict[str, Any]
    seconds: float
    measure: Callable[[], Iterable[dict[str, Any]]]


def run_rows(
    rows: Iterable[Row],
    *,
    seconds: float,
    write: Callable[[dict[str, Any]], None],
    clock: Callable[[], float] = perf_counter,
) -> None:
    """Measure the rows in order, and write each at once; a last row "end" says how many there are.

    A row is begun if its estimate, at the pace of the rows so far, fits what is left of the budget; if not, or if it
    fails, a row with the reason under `skipped` stands for it, and the next one has its turn.
    """
    began = clock()
    spent = estimated = 0.0
    measured = skipped = 0

    def put(kind: str, facts: dict[str, Any], at: float) -> None:
        nonlocal measured, skipped
        skipped += "skipped" in facts
        measured += "skipped" not in facts
        write({"row": kind} | facts | {"seconds": clock() - at, "total_seconds": clock() - began})

    for kind, about, estimate, measure in rows:
        at = clock()
        left, needed = seconds - (at - began), estimate * (max(spent / estimated, 1.0) if estimated else 1.0)
        if needed > left:
            put(kind, {**about, "skipped": f"it would take about {needed:.0f} s of the {max(left, 0):.0f} s left"}, at)
            continue
        try:
            for row in measure():
                put(kind, row, at)
        except Exception as e:  # whatever a library raises for one shape must not end the others
            reason = (str(e).strip().splitlines() or [""])[0][:300]
            put(kind, {**about, "skipped": f"{type(e).__name__}: {reason}"}, at)
        del measure  # and the arrays that it holds
        gc.collect()
        release()
        spent, estimated = spent + clock() - at, estimated + estimate
    write({"row": "end", "measured": measured, "skipped_rows": skipped, "total_seconds": clock() - began})


def share_memory() -> None:
    """Leave torch two fifths of a card's memory, of which JAX would take three quarters: before a device is touched."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
    if find_spec("torch") and not any(name in os.environ for name in names):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.6"


def shown(row: dict[str, Any]) -> str:
    """A row as a line to read."""

    def short(x: Any) -> str:
        if isinstance(x, dict):
            return "{" + ", ".join(f"{name} {short(value)}" for name, value in x.items()) + "}"
        if isinstance(x, list | tuple):
            return "[" + ", ".join(map(short, x)) + "]"
        return f"{x:.4g}" if isinstance(x, float) else str(x)

    return "  ".join([row["row"], *(f"{name}={short(x)}" for name, x in row.items() if name != "row")])
