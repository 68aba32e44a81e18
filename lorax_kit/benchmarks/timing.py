"""What every measurement shares: compiled calls that wait for their result, alternating rounds, aligned text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from statistics import median, quantiles
from time import perf_counter
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex


def facts(compiled: Any) -> dict[str, float]:
    """What XLA says of a compiled program: `flops`, `bytes`, `temp_bytes`, and the `peak_bytes` it holds at most.

    It counts the body of a loop once, however often that runs: see `product_flops`.
    """
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    counted = cost[0] if isinstance(cost, list) else cost
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "flops": float(counted["flops"]),
        "bytes": float(counted["bytes accessed"]),
        "temp_bytes": int(memory.temp_size_in_bytes),
        "peak_bytes": int(peak - memory.alias_size_in_bytes),
    }


def product_flops(fn: Callable[..., Any], *args: Any) -> int:
    """FLOPs of the dot products in `fn(*args)`: of a scan as often as it runs, of a while once, of a cond all branches.

    Example:
      >>> import jax.numpy as jnp
      >>> power = lambda w: jax.lax.scan(lambda h, _: (h @ w, None), w, length=5)[0]
      >>> product_flops(power, jnp.eye(3))
      270
    """
    return _products(jax.make_jaxpr(fn)(*args).jaxpr)


def _products(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            sizes = [eqn.invars[0].aval.shape[i] for i in contracted]
            total += 2 * prod(sizes) * eqn.outvars[0].aval.size
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(_products(inner) for inner in jex.jaxprs_in_params(eqn.params))
    return total


def waiting(fn: Callable[..., Any], *args: Any) -> Callable[[], None]:
    """`fn(*args)` compiled, as a call that returns when the result is there."""
    return calling(jax.jit(fn).lower(*args).compile(), *args)


def calling(compiled: Any, *args: Any) -> Callable[[], None]:
    """A compiled program as a call that returns when the result is there."""

    def run() -> None:
        jax.block_until_ready(compiled(*args))

    return run


def alternate(runs: Mapping[str, Callable[[], Any]], rounds: Iterable[Any]) -> dict[str, list[float]]:
    """Milliseconds of each run in each round; in a round every run has its turn, so they share the machine's mood.

    Every other round goes backwards: what ran just before leaves its caches and threads behind.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for n, _ in enumerate(rounds):
        for name, run in list(runs.items())[:: -1 if n % 2 else 1]:
            began = perf_counter()
            run()
            times[name].append(1e3 * (perf_counter() - began))
    return times


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
    found = [a / b for a, b in zip(times[one], times[other], strict=True)]
    quarters = quantiles(found, n=4) if len(found) > 1 else [found[0]] * 3
    return Ratio(median(found), [quarters[0], quarters[2]])


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Columns of the rows as aligned text."""

    def cell(x: Any) -> str:
        return "-" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x)

    cells = [list(columns), *([cell(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
