"""One row of the step benchmark: full fine-tuning, textbook LoRA, ours, and the peer, in alternating rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from tqdm import tqdm

from lorax_kit.benchmarks.case import Case, make_case
from lorax_kit.benchmarks.timing import alternate, prepared, ratio
from lorax_kit.benchmarks.torch_peer import torch_steps
from lorax_kit.core.leaves import FactorTree
from lorax_kit.core.merge import split
from lorax_kit.measure import facts
from lorax_kit.methods import Factors
from lorax_kit.training import make_step, partition
from lorax_kit.training.step import State
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
    adapted = {name: adapt(case.apply, case.plan, kernel=form, costs=costs) for name, form in kernels.items()}
    measured: dict[str, dict[str, float]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for name, contender in contenders(case, base, factors, adapted).items():
        (init, step), state = contender.make(), contender.state()
        # The first trace of a process also traces what JAX keeps of its own functions: the fastest of some counts.
        trace_s = min(
            _traced(contender.make()[1], init(contender.trained), contender.base, case.batch) for _ in range(4)
        )
        traced = step.trace(state, contender.base, case.batch)
        began = perf_counter()
        compiled = traced.lower().compile()
        measured[name] = {"trace_s": trace_s, "compile_s": perf_counter() - began} | facts(compiled)
        runs[name] = stepping(compiled, state, contender.base, case.batch)
    runs |= torch_steps(case, factors, RATE) if peer else {}
    first = {name: float(run()) for name, run in runs.items()}
    if max(first.values()) - min(first.values()) > 1e-3:
        raise ValueError(f"the steps do not start from one loss: {first}.")
    bar = tqdm(range(rounds), desc=f"{width} wide, {batch_size}x{length}, r={rank}", disable=None if progress else True)
    times = alternate({**runs, **peaks(SQUARE, LINE)}, bar)
    return (
        {"width": width, "layers": layers, "batch_size": batch_size, "length": length, "tokens": batch_size * length}
        | {"rank": rank, "targets": targets, "kernel": kernel, "rounds": rounds}
        | {f"{name}_ms": median(times[name]) if name in times else None for name in STEPS}
        | _ratios(times)
        | _static(measured)
        | _against_peak(times, measured)
        | {"backend": jax.default_backend(), "device": jax.devices()[0].device_kind}
    )


class Contender(NamedTuple):
    """A training step to be timed.

    Attributes:
      loss: (base, trained, batch) -> ().
      tx: the optimiser.
      trained, base: where it starts, and what it never changes (None where all is trained).
    """

    loss: Callable[..., Any]
    tx: optax.GradientTransformation
    trained: Any
    base: Any

    def make(self, *, jit: bool = True) -> tuple[Any, Any]:
        """`lk.make_step` of it."""
        return make_step(self.loss, self.tx, jit=jit)

    def state(self) -> State:
        """A state of its own to start from: steps donate it."""
        state: State = self.make(jit=False)[0](self.trained)
        return state


def contenders(
    case: Case, base: Any, factors: FactorTree, adapted: Mapping[str, Callable[..., Any]]
) -> dict[str, Contender]:
    """The steps by name: "full", "naive", and one per adapted function."""
    tx = partition(optax.adamw(RATE), case.plan)
    textbook = {p: Factors(f.a.T, f.b) if isinstance(f, Factors) else f for p, f in factors.items()}

    def of(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda base, trained, batch: case.loss(fn(base, trained, batch), batch)

    return {
        "full": Contender(of(lambda _, params, batch: case.apply(params, batch)), optax.adamw(RATE), case.params, None),
        "naive": Contender(of(partial(naive_apply, case)), tx, textbook, base),
    } | {name: Contender(of(fn), tx, factors, base) for name, fn in adapted.items()}


def stepping(compiled: Any, state: Any, base: Any, batch: Any) -> Callable[[], Array]:
    """A compiled step as a call that trains on, and returns its loss."""
    held = [state]

    def run() -> Array:
        held[0], info = compiled(held[0], base, batch)
        loss: Array = info.loss
        return loss

    return run


def peaks(square: int, line: int, dtype: str = "float32") -> dict[str, Callable[[], Any]]:
    """What a roofline rests on: a product large enough, and reading and writing an array larger than the caches."""
    x, y = (jax.random.normal(jax.random.key(2), shape, dtype) for shape in ((square, square), (line,)))
    return {"gemm": prepared(lambda x: x @ x, x), "copy": prepared(lambda x: x + jnp.ones((), x.dtype), y)}


def _traced(step: Any, state: Any, own: Any, batch: Any) -> float:
    began = perf_counter()
    step.trace(state, own, batch)
    return perf_counter() - began


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
        against = ratio(times, one, other)
        out |= {f"ratio_{name}": against.median, f"spread_{name}": against.spread}
    return out


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
        x = args[0]
        return y + case.scale * ((x @ f.a.astype(x.dtype)) @ f.b.astype(x.dtype))

    params = {**base, "classifier": {k: factors[f"classifier/{k}"].value for k in base["classifier"]}}
    with nn.intercept_methods(intercept):
        return case.apply(params, batch)
