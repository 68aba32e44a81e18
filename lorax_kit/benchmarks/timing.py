"""What every measurement shares: compiled calls that wait for their result, alternating rounds, aligned text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil, prod
from statistics import median, quantiles
from time import perf_counter
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex


def facts(compiled: Any) -> dict[str, float]:
    """What XLA says of a compiled program: `flops`, `bytes`, `temp_bytes`, and the `peak_bytes` it holds at most.

    It counts the body of a loop once, however often that runs: see `product_flops`. A backend that does not tell
    (what libraries run counts as nothing on some) is given zeros.
    """
    memory = compiled.memory_analysis()
    try:
        cost = compiled.cost_analysis() or {}
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        cost = {}
    counted = cost[0] if isinstance(cost, list) else cost
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "flops": float(counted.get("flops", 0)),
        "bytes": float(counted.get("bytes accessed", 0)),
        "temp_bytes": int(memory.temp_size_in_bytes),
        "peak_bytes": int(peak - memory.alias_size_in_bytes),
    }


def product_flops(fn: Callable[..., Any], *args: Any) -> int:
    """FLOPs of the dot products in `fn(*args)`: of a scan as often as it runs, of a while once, of a cond all branches.

    Products that the results do not need are not counted.

    Example:
      >>> import jax.numpy as jnp
      >>> power = lambda w: jax.lax.scan(lambda h, _: (h @ w, None), w, length=5)[0]
      >>> product_flops(power, jnp.eye(3))
      270
      >>> product_flops(lambda w: (w @ w, w)[1], jnp.eye(3))
      0
    """
    return traced_flops(jax.make_jaxpr(fn)(*args))


def traced_flops(program: Any) -> int:
    """`product_flops` of a traced program (a closed jaxpr)."""
    return _products(program.jaxpr, [True] * len(program.jaxpr.outvars))[0]


def _products(jaxpr: Any, wanted: Sequence[bool]) -> tuple[int, list[bool]]:
    """FLOPs of the wanted outputs, and which inputs those need."""
    total, needed = 0, {v for v, w in zip(jaxpr.outvars, wanted, strict=True) if w and not isinstance(v, jex.Literal)}
    for eqn in reversed(jaxpr.eqns):
        outs = [v in needed for v in eqn.outvars]
        if not any(outs) and not eqn.effects:
            continue
        reads = [True] * len(eqn.invars)
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            sizes = [eqn.invars[0].aval.shape[i] for i in contracted]
            total += 2 * prod(sizes) * eqn.outvars[0].aval.size
        elif eqn.primitive.name in ("jit", "pjit") and not eqn.effects:
            within, reads = _products(eqn.params["jaxpr"].jaxpr, outs)
            total += within
        else:
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            inner = [getattr(j, "jaxpr", j) for j in jex.jaxprs_in_params(eqn.params)]
            total += times * sum(_products(j, [True] * len(j.outvars))[0] for j in inner)
        needed |= {v for v, r in zip(eqn.invars, reads, strict=True) if r and not isinstance(v, jex.Literal)}
    return total, [v in needed for v in jaxpr.invars]


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
