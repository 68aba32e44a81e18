"""A forward pass with its linear parameters compressed, against the dense one, in alternating rounds."""

from __future__ import annotations

from statistics import median
from typing import Any

import jax
from tqdm import tqdm

from lorax_kit.benchmarks.case import make_case
from lorax_kit.benchmarks.timing import alternate, calling, facts, ratio
from lorax_kit.compress import compress, compressed, plan_ranks

FORWARD_COLUMNS = (
    *("width", "layers", "tokens", "keep", "dense_ms", "small_ms", "latency_ratio"),
    *("flops_ratio", "bytes_ratio", "temp_ratio"),
)


def bench_forward(
    *, width: int, layers: int, batch_size: int, length: int, keep: float, rounds: int, progress: bool = True
) -> dict[str, Any]:
    """One row: a BERT classifier on random weights and tokens, every linear parameter of its layers at one share.

    `latency_ratio` is the median over the rounds of compressed against dense in the same round; `spread` its quartiles.
    """
    case = make_case(width=width, layers=layers, batch_size=batch_size, length=length, rank=1, targets="all-linear")
    plan = plan_ranks(case.params, case.plan, keep=keep, method="svd", allocation="uniform")
    models = {"dense": (case.apply, case.params), "small": (compressed(case.apply), compress(case.params, plan))}
    compiled = {name: jax.jit(fn).lower(params, case.batch).compile() for name, (fn, params) in models.items()}
    dense, small = (facts(program) for program in compiled.values())
    runs = {name: calling(program, models[name][1], case.batch) for name, program in compiled.items()}
    bar = tqdm(range(rounds), desc=f"{width} wide, {batch_size}x{length}, keep {keep:g}", disable=not progress)
    times = alternate(runs, bar)
    latency = ratio(times, "small", "dense")
    sizes = {"width": width, "layers": layers, "batch_size": batch_size, "length": length}
    return {
        **sizes,
        "tokens": batch_size * length,
        "keep": plan.kept,
        "rounds": rounds,
        "dense_ms": median(times["dense"]),
        "small_ms": median(times["small"]),
        "latency_ratio": latency.median,
        "spread": latency.spread,
        **{f"{name}_ratio": small[key] / dense[key] for name, key in
           (("flops", "flops"), ("bytes", "bytes"), ("temp", "temp_bytes"))},
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }  # fmt: skip
