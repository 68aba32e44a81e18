"""A forward pass with its linear parameters compressed, against the dense one, in alternating rounds."""

from __future__ import annotations

from statistics import median
from typing import Any

import jax
from tqdm import tqdm

from lorax_kit.benchmarks.case import Case
from lorax_kit.benchmarks.timing import alternate, calling, ratio
from lorax_kit.compress import CompressPlan, LowRank, compress, compressed, plan_ranks
from lorax_kit.core.paths import flatten, unflatten
from lorax_kit.measure import facts, product_flops

FORWARD_COLUMNS = (
    *("width", "layers", "tokens", "keep", "dense_ms", "small_ms", "latency_ratio"),
    *("flops_ratio", "bytes_ratio", "temp_ratio"),
)


def bench_forward(
    case: Case, *, keep: float, rounds: int, least_ms: float = 0.0, decomposed: bool = True, progress: bool = True
) -> dict[str, Any]:
    """One row: a case with every parameter that it adapts at one share.

    `latency_ratio` is the median over the rounds of compressed against dense in the same round; `spread` its quartiles.
    Without `decomposed` the factors are drawn, at the ranks of that share: time does not depend on what they hold, and
    decompositions of large parameters on the host take minutes.
    """
    width, (batch_size, length) = case.config.hidden_size, case.batch.ids.shape
    if decomposed:
        plan = plan_ranks(case.params, case.plan, keep=keep, method="svd", allocation="uniform")
        params = compress(case.params, plan)
    else:
        plan, params = _drawn(case, keep)
    models = {"dense": (case.apply, case.params), "small": (compressed(case.apply), params)}
    compiled = {name: jax.jit(fn).lower(params, case.batch).compile() for name, (fn, params) in models.items()}
    dense, small = (
        facts(program) | {"flops": product_flops(*models[name], case.batch)} for name, program in compiled.items()
    )
    runs = {name: calling(program, models[name][1], case.batch) for name, program in compiled.items()}
    bar = tqdm(
        range(rounds), desc=f"{width} wide, {batch_size}x{length}, keep {keep:g}", disable=None if progress else True
    )
    times = alternate(runs, bar, least_ms=least_ms)
    latency = ratio(times, "small", "dense")
    return {
        "width": width,
        "layers": case.config.num_hidden_layers,
        "batch_size": batch_size,
        "length": length,
        "tokens": batch_size * length,
        "keep": plan.kept,
        "rounds": rounds,
        "dense_ms": median(times["dense"]),
        "small_ms": median(times["small"]),
        "latency_ratio": latency.median,
        "spread": latency.spread,
        **{f"{name}_ratio": small[key] / dense[key] if dense[key] else None for name, key in
           (("flops", "flops"), ("bytes", "bytes"), ("temp", "temp_bytes"))},
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }  # fmt: skip


def _drawn(case: Case, keep: float) -> tuple[CompressPlan, Any]:
    """A plan at one share everywhere, and params with random factors of its ranks."""
    sizes = {site.path: CompressPlan.parameters(site, None) for site in case.plan.sites}
    ranks = {s.path: int(keep * sizes[s.path] / CompressPlan.parameters(s, 1)) for s in case.plan.sites}
    named, treedef = flatten(case.params)
    for i, site in enumerate(case.plan.sites):
        w, rank = named[site.path], ranks[site.path]
        key_a, key_b = jax.random.split(jax.random.key(i))
        a, b = (
            jax.random.normal(key, (rank, size), w.dtype) for key, size in zip((key_a, key_b), w.shape, strict=True)
        )
        named[site.path] = LowRank(a=a / w.shape[0], b=b, shape=w.shape, dtype=w.dtype)
    return CompressPlan(method="svd", sites=case.plan, ranks=ranks), unflatten(named, treedef)
