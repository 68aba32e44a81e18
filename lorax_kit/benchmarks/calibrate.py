"""Measures what the two forms of a low-rank product cost on this machine, for the cost model of `lk.adapt`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lorax_kit.benchmarks.timing import alternate, prepared, table
from lorax_kit.transform.cost import Costs, Product, choose, measured_costs
from lorax_kit.transform.kernels import KERNELS, Operand

# (tokens, inputs, outputs) around where either form begins to pay, and clear cases of both.
SHAPES = (
    *((256, 384, 384), (1024, 384, 384), (512, 384, 1536), (1024, 1536, 384), (4096, 256, 256)),
    *((512, 768, 768), (1024, 768, 3072), (256, 1024, 1024), (2048, 1024, 1024), (256, 2048, 2048)),
)
RANKS = (1, 8, 64)


def calibrate(
    *,
    rounds: int,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    ranks: Sequence[int] = RANKS,
    progress: bool = True,
) -> dict[str, Any]:
    """Times both forms, forward and backward, over shapes and ranks, in alternation, and fits `Costs` to them.

    The difference of the two forms is linear in the costs (`transform.Costs`); least squares with no cost below 0,
    each shape weighted by its own time, so that a small product counts as much as a large one.

    Returns:
      The costs, and per shape its medians in ms, what the costs choose, and `regret`: time of the choice over the best;
      beside them what the costs that `adapt` has for this backend without a file choose, and `shipped_regret`.
    """
    rows = [
        time_forms(shape, rank, rounds=rounds)
        for shape, rank in tqdm(list(product(shapes, ranks)), desc="calibrate", disable=None if progress else True)
    ]
    return fitted(rows) | {"rounds": rounds, "shapes": rows}


def time_forms(shape: tuple[int, int, int], rank: int, *, rounds: int, least_ms: float = 0.0) -> dict[str, Any]:
    """Medians of both forms of one product, with what the costs that `adapt` has for this backend choose.

    `shipped_regret` is the time of that choice over the best.
    """
    m, k, n = shape
    runs = {how: _form(how, m, k, n, rank) for how in ("factored", "merged")}
    times = {f"{how}_ms": median(found) for how, found in alternate(runs, range(rounds), least_ms=least_ms).items()}
    row = {"tokens": m, "inputs": k, "outputs": n, "rank": rank, **times}
    return row | _chosen(row, measured_costs(jax.default_backend()), "shipped", "shipped_regret")


def _chosen(row: Mapping[str, Any], costs: Costs, choice: str, regret: str) -> dict[str, Any]:
    """What costs choose for a row, and the time of that over the best, by these names."""
    how = choose(Product(1, row["tokens"], row["inputs"], row["outputs"], row["rank"]), costs)[0]
    return {choice: how, regret: row[f"{how}_ms"] / min(row["factored_ms"], row["merged_ms"])}


def fitted(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The costs fitted to rows of `time_forms`, each of which is told its `choice` and `regret` by them."""
    costs = _fit(rows)
    for row in rows:
        row.update(_chosen(row, costs, "choice", "regret"))
    return {
        "activation": list(costs.activation),
        "weight": list(costs.weight),
        "device": costs.device,
        "backend": jax.default_backend(),
        "worst_regret": max(row["regret"] for row in rows),
        "worst_shipped_regret": max(row["shipped_regret"] for row in rows),
    }


def _form(how: str, m: int, k: int, n: int, r: int) -> Callable[[], None]:
    """A compiled forward and backward pass of one product."""
    keys = jax.random.split(jax.random.key(0), 5)
    x, w, a, b, g = (
        jax.random.normal(key, shape) for key, shape in zip(keys, ((m, k), (k, n), (r, k), (r, n), (m, n)), strict=True)
    )

    def both(x: Any, w: Any, a: Any, b: Any, g: Any) -> Any:
        def forward(x: Any, a: Any, b: Any) -> Any:
            return KERNELS[how].run(x, (Operand(w, a, b, jnp.float32(0.5)),), None)[0]

        y, back = jax.vjp(forward, x, a, b)
        return y, back(g)

    return prepared(both, x, w, a, b, g)


def _fit(rows: Sequence[dict[str, Any]]) -> Costs:
    """Costs whose difference comes closest to the measured one."""

    def terms(row: dict[str, Any]) -> list[float]:
        m, k, n, r = (row[name] for name in ("tokens", "inputs", "outputs", "rank"))
        return [m * (k + n), m * (k + n) * r, -2 * k * n, -2 * k * n * r]

    weight = 1 / np.array([row["factored_ms"] + row["merged_ms"] for row in rows])
    difference = 1e6 * np.array([row["factored_ms"] - row["merged_ms"] for row in rows])  # ns
    matrix, wanted = np.array([terms(row) for row in rows]) * weight[:, None], difference * weight
    # Four unknowns of at least 0: the best of the least squares over each choice of those that are not 0.
    best, a0, a1, w0, w1 = float(wanted @ wanted), 0.0, 0.0, 0.0, 0.0
    for chosen in (c for n in range(1, 5) for c in combinations(range(4), n)):
        solution = np.zeros(4)
        solution[list(chosen)] = np.linalg.lstsq(matrix[:, chosen], wanted, rcond=None)[0]
        error = float(np.sum((matrix @ solution - wanted) ** 2))
        if error < best and solution.min() >= 0:
            best, (a0, a1, w0, w1) = error, (float(x) for x in solution)
    return Costs(activation=(a0, a1), weight=(w0, w1), device=jax.devices()[0].device_kind)


def calibration_table(found: dict[str, Any]) -> str:
    """The measured shapes as aligned text."""
    head = ("tokens", "inputs", "outputs", "rank", "factored_ms", "merged_ms", "choice", "regret")
    return table(found["shapes"], head)
