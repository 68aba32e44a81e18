"""What every measurement shares: compiled calls that wait for their result, alternating rounds, aligned text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil
from statistics import median, quantiles
from time import perf_counter
from typing import Any, NamedTuple

import jax


def prepared(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """`fn(*args)` compiled, as a call for `alternate`."""
    return calling(jax.jit(fn).lower(*args).compile(), *args)


def calling(compiled: Any, *args: Any) -> Callable[[], Any]:
    """A compiled program as a call for `alternate`: its result may still be on its way."""
    return lambda: compiled(*args)


def alternate(
    runs: Mapping[str, Callable[[], Any]], rounds: Iterable[Any], *, least_ms: float = 0.0
) -> dict[str, list[float]]:
    """Milliseconds of each run in each round; in a round every run has its turn, so they share the machine's mood.

    Every other round goes backwards: what ran just before leaves its caches and threads behind.

    Args:
      runs: name -> a call; its turn ends when all that the call returns is there (`jax.block_until_ready`).
      rounds: as many as it yields.
      least_ms: a turn calls its run as often as fills this time, and waits once: on a device whose calls return before
        they are done a single short one would be timed by what it costs to start and to wait for it.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    repeats = {}
    for name, run in runs.items():
        _turn(run, 1)
        repeats[name] = min(max(ceil(least_ms / max(_turn(run, 1), 1e-3)), 1), 1000) if least_ms else 1
    for n, _ in enumerate(rounds):
        for name, run in list(runs.items())[:: -1 if n % 2 else 1]:
            times[name].append(_turn(run, repeats[name]))
    return times


def _turn(run: Callable[[], Any], repeats: int) -> float:
    began = perf_counter()
    for _ in range(repeats):
        out = run()
    jax.block_until_ready(out)
    return 1e3 * (perf_counter() - began) / repeats


class Ratio(NamedTuple):
    """One run against another, over rounds: the median of the ratios within each round, and their quartiles."""

    median: float
    spread: list[float]


def ratio(times: Mapping[str, Sequence[float]], one: str, other: str) -> Ratio:
    """Of `alternate`'s times: the pairs of a round share the machine's mood.

    Example:
      >>> ratio({"ours": [1.0, 2.0, 3.0], "theirs": [2.0, 2.0, 2.0]}, "ours", "theirs")
      Ratio(median=1.0, spread=[0.5, 1.5])
    """
    ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
    quarters = quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return Ratio(median(ratios), [quarters[0], quarters[2]])


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Columns of the rows as aligned text."""

    def cell(x: Any) -> str:
        return "-" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x)

    cells = [list(columns), *([cell(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
