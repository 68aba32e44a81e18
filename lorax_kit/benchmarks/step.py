"""One row of the step benchmark: full fine-tuning, textbook LoRA, ours, and the peer, in alternating rounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import flax.linen as nn
import jax
import optax
from tqdm import tqdm

from lorax_kit.benchmarks.case import Case, make_case
from lorax_kit.benchmarks.timing import alternate, facts, ratio, waiting
from lorax_kit.benchmarks.torch_peer import torch_steps
from lorax_kit.core.merge import split
from lorax_kit.methods import Factors
from lorax_kit.training import make_step, partition
from lorax_kit.transform import Costs, adapt

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
    "factored_ms",
    "merged_ms",
    "ratio_full",
    "ratio_naive",
    "ratio_peft",
    "ratio_best",
    "flops_ratio",
    "temp_ratio",
    "trace_ratio",
    "of_peak",
)
STEPS = ("full", "naive", "ours", "factored", "merged", "peft", "torch_full")
RATE = 1e-3
SQUARE, LINE = 2048, 2**25


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
    forms: bool = False,
    costs: Costs | None = None,
    peer: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """One row: AdamW steps of a BERT classifier on random weights and tokens.

    "full" trains every parameter; "naive" adapts by x W + s (x A) B with A (in, r), differentiated by JAX;
    "ours" is `lk.adapt` with its cost model; with `forms`, "factored" and "merged" are each of its forms everywhere,
    and `ratio_best` is ours against the faster of the two. All are `lk.make_step` under jit with a donated state.
    "peft" and "torch_full" are the same model, weights and batch in torch (None without the interop extra). `of_peak`
    is what ours reaches, FLOPs over time, of a large product's rate, measured in the same rounds.

    Ratios are medians over the rounds of ours against the other in the same round; `spread_*` their quartiles.
    """
    case = make_case(width=width, layers=layers, batch_size=batch_size, length=length, rank=rank, targets=targets)
    base, factors = split(case.params, case.plan, jax.random.key(1))
    kernels = {"ours": kernel} | ({"factored": "factored", "merged": "merged"} if forms else {})
    textbook = {p: Factors(f.a.T, f.b) if isinstance(f, Factors) else f for p, f in factors.items()}
    tx = partition(optax.adamw(RATE), case.plan)
    losses: dict[str, Callable[..., Any]] = {
        "full": lambda _, p, b: case.loss(case.apply(p, b), b),
        "naive": lambda base, f, b: case.loss(naive_apply(case, base, f, b), b),
    } | {name: _adapted_loss(case, form, costs) for name, form in kernels.items()}
    starts: dict[str, Any] = {"full": (case.params, None), "naive": (textbook, base)}
    starts |= dict.fromkeys(kernels, (factors, base))
    measured: dict[str, dict[str, float]] = {name: {} for name in losses}
    runs: dict[str, Callable[[], float]] = {}
    for name, loss in losses.items():
        make = partial(make_step, loss, optax.adamw(RATE) if name == "full" else tx)
        (init, step), (trained, own) = make(), starts[name]
        # The first trace of a process also traces what JAX keeps of its own functions: the fastest of some counts.
        measured[name]["trace_s"] = min(_traced(make()[1], init(trained), own, case.batch) for _ in range(4))
        runs[name] = _compiled(step, init(trained), own, case.batch, measured[name])
    runs |= torch_steps(case, factors, RATE) if peer else {}
    first = {name: run() for name, run in runs.items()}
    if max(first.values()) - min(first.values()) > 1e-3:
        raise ValueError(f"the steps do not start from one loss: {first}.")
    # The peaks: a product large enough, and reading and writing an array far larger than the caches.
    square, line = (jax.random.normal(jax.random.key(2), shape) for shape in ((SQUARE, SQUARE), (LINE,)))
    peaks = {"gemm": waiting(lambda x: x @ x, square), "copy": waiting(lambda x: x + 1, line)}
    bar = tqdm(range(rounds), desc=f"{width} wide, {batch_size}x{length}, r={rank}", disable=not progress)
    times = alternate({**runs, **peaks}, bar)
    return (
        {"width": width, "layers": layers, "batch_size": batch_size, "length": length, "tokens": batch_size * length}
        | {"rank": rank, "targets": targets, "kernel": kernel, "rounds": rounds}
        | {f"{name}_ms": median(times[name]) if name in times else None for name in STEPS}
        | _ratios(times)
        | _static(measured)
        | _against_peak(times, measured)
        | {"backend": jax.default_backend(), "device": jax.devices()[0].device_kind}
    )


def _traced(step: Any, state: Any, own: Any, batch: Any) -> float:
    began = perf_counter()
    step.trace(state, own, batch)
    return perf_counter() - began


def _compiled(step: Any, state: Any, own: Any, batch: Any, into: dict[str, float]) -> Callable[[], float]:
    """The compiled step as a call that returns its loss; what compiling and running it needs goes `into`."""
    traced = step.trace(state, own, batch)
    began = perf_counter()
    compiled = traced.lower().compile()
    into["compile_s"] = perf_counter() - began
    into |= facts(compiled)
    held = [state]

    def run() -> float:
        held[0], info = compiled(held[0], own, batch)
        return float(info.loss)

    return run


def _ratios(times: dict[str, list[float]]) -> dict[str, Any]:
    """Ours against each other step."""
    out: dict[str, Any] = {}
    forms = [name for name in ("factored", "merged") if name in times]
    pairs = {"full": ("ours", "full"), "naive": ("ours", "naive"), "peft": ("ours", "peft")}
    pairs["full_torch_full"] = ("full", "torch_full")
    pairs["best"] = ("ours", min(forms, key=lambda name: median(times[name]), default="factored"))
    for name, (one, other) in pairs.items():
        if other not in times:
            out |= {f"ratio_{name}": None, f"spread_{name}": None}
            continue
        found = ratio(times, one, other)
        out |= {f"ratio_{name}": found.median, f"spread_{name}": found.spread}
    return out


def _adapted_loss(case: Case, kernel: str, costs: Costs | None) -> Callable[..., Any]:
    adapted = adapt(case.apply, case.plan, kernel=kernel, costs=costs)
    return lambda base, factors, batch: case.loss(adapted(base, factors, batch), batch)


def _against_peak(times: dict[str, list[float]], measured: dict[str, dict[str, float]]) -> dict[str, float]:
    """The roofline: GFLOP/s of the large product, GB/s of the copy, and each step's FLOPs over its median time."""
    rates = {name: values["flops"] / median(times[name]) / 1e6 for name, values in measured.items()}
    peak, bandwidth = 2 * SQUARE**3 / median(times["gemm"]) / 1e6, 2 * 4 * LINE / median(times["copy"]) / 1e6
    out = {"peak_gflops": peak, "peak_gbytes": bandwidth} | {f"{name}_gflops": rate for name, rate in rates.items()}
    return out | {"of_peak": rates["ours"] / peak}


def _static(measured: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What does not depend on the machine's mood, and the ratios of ours to full fine-tuning."""
    out: dict[str, Any] = {}
    for name in ("flops", "bytes", "temp_bytes", "peak_bytes", "trace_s", "compile_s"):
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
