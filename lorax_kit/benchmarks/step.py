"""One row of the step benchmark: full fine-tuning, textbook LoRA, ours, and the peer, in alternating rounds."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import flax.linen as nn
import jax
import optax
from tqdm import tqdm

from lorax_kit.benchmarks.case import Case, make_case
from lorax_kit.benchmarks.torch_peer import torch_steps
from lorax_kit.core.factors import Factors
from lorax_kit.core.merge import split
from lorax_kit.training import make_step, partition
from lorax_kit.transform import adapt

COLUMNS = (
    "width",
    "layers",
    "tokens",
    "rank",
    "targets",
    "full_ms",
    "naive_ms",
    "ours_ms",
    "peft_ms",
    "torch_full_ms",
    "ratio_full",
    "ratio_naive",
    "ratio_peft",
    "flops_ratio",
    "temp_ratio",
    "trace_ratio",
)
RATE = 1e-3


def bench_step(
    *,
    width: int,
    layers: int,
    batch_size: int,
    length: int,
    rank: int,
    targets: str,
    rounds: int,
    kernel: str = "auto",
    peer: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """One row: AdamW steps of a BERT classifier on random weights and tokens.

    "full" trains every parameter; "naive" adapts by x W + s (x A) B with A (in, r), differentiated by JAX;
    "ours" is `lk.adapt` with its cost model. All three are `lk.make_step` under jit with a donated state. "peft" and
    "torch_full" are the same model, weights and batch in torch (None without the interop extra).

    Ratios are medians over the rounds of ours against the other in the same round; `spread_*` their quartiles.
    """
    case = make_case(width=width, layers=layers, batch_size=batch_size, length=length, rank=rank, targets=targets)
    base, factors = split(case.params, case.plan, jax.random.key(1))
    adapted = adapt(case.apply, case.plan, kernel=kernel)
    textbook = {p: Factors(f.a.T, f.b) if isinstance(f, Factors) else f for p, f in factors.items()}
    tx = partition(optax.adamw(RATE), case.plan)
    losses: dict[str, Callable[..., Any]] = {
        "full": lambda _, p, b: case.loss(case.apply(p, b), b),
        "naive": lambda base, f, b: case.loss(naive_apply(case, base, f, b), b),
        "ours": lambda base, f, b: case.loss(adapted(base, f, b), b),
    }
    starts = {"full": (case.params, None), "naive": (textbook, base), "ours": (factors, base)}
    measured: dict[str, dict[str, float]] = {name: {} for name in losses}
    runs: dict[str, Callable[[], float]] = {}
    for name, loss in losses.items():
        init, step = make_step(loss, optax.adamw(RATE) if name == "full" else tx)
        factors_or_params, own = starts[name]
        runs[name] = _compiled(step, init(factors_or_params), own, case.batch, measured[name])
    runs |= torch_steps(case, rank, RATE) if peer else {}
    first = {name: run() for name, run in runs.items()}
    if max(first.values()) - min(first.values()) > 1e-3:
        raise ValueError(f"the steps do not start from one loss: {first}.")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in tqdm(range(rounds), desc=f"{width} wide, {batch_size}x{length}, r={rank}", disable=not progress):
        for name, run in runs.items():
            began = perf_counter()
            run()
            times[name].append(1e3 * (perf_counter() - began))
    return (
        {"width": width, "layers": layers, "batch_size": batch_size, "length": length, "tokens": batch_size * length}
        | {"rank": rank, "targets": targets, "kernel": kernel, "rounds": rounds}
        | {f"{name}_ms": median(times[name]) if name in times else None for name in (*losses, "peft", "torch_full")}
        | _ratios(times)
        | _static(measured)
        | {"backend": jax.default_backend(), "device": jax.devices()[0].device_kind}
    )


def _compiled(step: Any, state: Any, own: Any, batch: Any, into: dict[str, float]) -> Callable[[], float]:
    """The compiled step as a call that returns its loss; what tracing, compiling and running it needs goes `into`."""
    began = perf_counter()
    traced = step.trace(state, own, batch)
    into["trace_s"] = perf_counter() - began
    began = perf_counter()
    compiled = traced.lower().compile()
    into["compile_s"] = perf_counter() - began
    cost = compiled.cost_analysis()
    into["flops"] = float((cost[0] if isinstance(cost, list) else cost)["flops"])
    memory = compiled.memory_analysis()
    into["temp_bytes"] = int(memory.temp_size_in_bytes)
    into["peak_bytes"] = int(
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    held = [state]

    def run() -> float:
        held[0], info = compiled(held[0], own, batch)
        return float(info.loss)

    return run


def _ratios(times: dict[str, list[float]]) -> dict[str, Any]:
    """Ours against each other step: the pairs of a round share the machine's mood."""
    out: dict[str, Any] = {}
    for other, name in (("full", "full"), ("naive", "naive"), ("peft", "peft")):
        if other not in times:
            out |= {f"ratio_{name}": None, f"spread_{name}": None}
            continue
        pairs = [a / b for a, b in zip(times["ours"], times[other], strict=True)]
        quarters = quantiles(pairs, n=4) if len(pairs) > 1 else [pairs[0]] * 3
        out |= {f"ratio_{name}": median(pairs), f"spread_{name}": [quarters[0], quarters[2]]}
    out["ratio_full_torch_full"] = (
        median(a / b for a, b in zip(times["full"], times["torch_full"], strict=True))
        if "torch_full" in times
        else None
    )
    return out


def _static(measured: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What does not depend on the machine's mood, and the ratios of ours to full fine-tuning."""
    out: dict[str, Any] = {}
    for name in ("flops", "temp_bytes", "peak_bytes", "trace_s", "compile_s"):
        out |= {f"{step}_{name}": values[name] for step, values in measured.items()}
    ours, full, naive = (measured[name] for name in ("ours", "full", "naive"))
    out |= {"flops_ratio": ours["flops"] / full["flops"], "temp_ratio": ours["temp_bytes"] / full["temp_bytes"]}
    out |= {"peak_ratio": ours["peak_bytes"] / full["peak_bytes"], "trace_ratio": ours["trace_s"] / full["trace_s"]}
    return out | {"naive_flops_ratio": naive["flops"] / full["flops"], "temp_bytes": ours["temp_bytes"]}


def naive_apply(case: Case, base: Any, factors: Any, batch: Any) -> Any:
    """The textbook form, inserted where a Dense runs: what hand-written LoRA layers do."""
    sites = {site.path for site in case.plan.sites}

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = next_fun(*args, **kwargs)
        path = "/".join((*context.module.path, "kernel"))
        if path not in sites or context.method_name != "__call__":
            return y
        f = factors[path]
        return y + case.scale * ((args[0] @ f.a) @ f.b)

    params = {**base, "classifier": {k: factors[f"classifier/{k}"].value for k in base["classifier"]}}
    with nn.intercept_methods(intercept):
        return case.apply(params, batch)


def table(rows: list[dict[str, Any]]) -> str:
    """`COLUMNS` of the rows as aligned text."""

    def cell(x: Any) -> str:
        return "-" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x)

    cells = [list(COLUMNS), *([cell(row[c]) for c in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
