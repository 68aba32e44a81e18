"""Training steps side by side: ours against full fine-tuning, textbook LoRA and PEFT; with and without its orders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax_kit.arrays.after import at_once
from lorax_kit.benchmarks.case import Case, make_case
from lorax_kit.benchmarks.device.machine import held_bytes, precision
from lorax_kit.benchmarks.steps.step import RATE, Contender, contenders, peaks, stepping
from lorax_kit.benchmarks.timing import alternate, ratio
from lorax_kit.benchmarks.torch_peer import lacking, peak_bytes, torch_steps
from lorax_kit.core.merge import split
from lorax_kit.measure import facts, traced_flops
from lorax_kit.transform import adapt, explain


class Shape(NamedTuple):
    """Sizes of a stack of transformer layers and of its batch, and the dtype of its params."""

    width: int
    layers: int
    batch_size: int
    length: int
    head: int
    dtype: str

    def facts(self) -> dict[str, Any]:
        """As a row holds them."""
        return self._asdict() | {"tokens": self.batch_size * self.length, "precision": precision(self.dtype)}


class Timing(NamedTuple):
    """How long to measure: rounds, and the least milliseconds of a turn."""

    rounds: int
    least_ms: float


class Program(NamedTuple):
    """A compiled training step.

    Attributes:
      run: trains on by one step, and returns its loss.
      facts: FLOPs of its products, and what XLA says: `bytes`, `temp_bytes`, `peak_bytes`; `extra_bytes` are those
        beyond its arguments.
    """

    run: Callable[[], Any]
    facts: dict[str, Any]


def compiled_programs(traced: Mapping[str, tuple[Any, Callable[[Any], Callable[[], Any]]]]) -> dict[str, Program]:
    """Programs compiled: one alone, so that others find the kernels that it chose by trial, then those side by side.

    Args:
      traced: name -> (a traced jit, and what makes a call of its compiled program).
    """
    lowered = {name: program.lower() for name, (program, _) in traced.items()}
    compiled = {name: program.compile() for name, program in list(lowered.items())[:1]}
    with ThreadPoolExecutor() as pool:
        rest = {name: pool.submit(program.compile) for name, program in lowered.items() if name not in compiled}
        compiled |= {name: one.result() for name, one in rest.items()}
    out = {}
    for name, (program, call) in traced.items():
        memory = compiled[name].memory_analysis()
        extra = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        own = facts(compiled[name]) | {"flops": traced_flops(program.jaxpr), "extra_bytes": int(extra)}
        out[name] = Program(call(compiled[name]), own)
    return out


def step_programs(steps: Mapping[str, Contender], batch: Any, unordered: Collection[str] = ()) -> dict[str, Program]:
    """The steps compiled, those of `unordered` without their waits."""
    traced = {}
    for name, one in steps.items():
        fn, state = one.make(jit=False)[1], one.state()
        fn = at_once(fn) if name in unordered else fn
        program = jax.jit(fn, donate_argnums=(0,)).trace(state, one.base, batch)
        traced[name] = program, _caller(state, one.base, batch)
    return compiled_programs(traced)


def _caller(state: Any, base: Any, batch: Any) -> Callable[[Any], Callable[[], Any]]:
    return lambda compiled: stepping(compiled, state, base, batch)


def step_row(
    shape: Shape,
    *,
    timing: Timing,
    square: int,
    line: int,
    rank: int = 8,
    peer: bool = True,
    compiled_peer: bool = False,
) -> Iterator[dict[str, Any]]:
    """One all-linear step: "ours" against "full", "naive" (as in `bench_step`), and the peers.

    Ours in fp32 sums W + s A^T B where the cost model says so; "factored" is ours without. `flops` are those of matrix
    products, `share_of_rate` what a step reaches of the rate of one large product, measured in the same rounds.
    `temp_bytes` and `peak_bytes` are XLA's; `extra_bytes` XLA's beyond the arguments, and `held_bytes` the same as the
    device's allocator counts it (the peers' by torch's). `compile_s` is what tracing and compiling ours, "full" and
    "naive" took, `sites` how many of ours run in which form.
    """
    case, base, factors = _case(shape, rank)
    kernels = {"ours": "auto"} | ({"factored": "factored"} if shape.dtype == "float32" else {})
    adapted = {name: adapt(case.apply, case.plan, kernel=kernel) for name, kernel in kernels.items()}
    began = perf_counter()
    programs = step_programs(contenders(case, base, factors, adapted), case.batch)
    compile_s = perf_counter() - began
    peers = torch_steps(case, factors, RATE, compiled=compiled_peer) if peer else {}
    runs = {name: program.run for name, program in programs.items()} | peers
    losses = {name: float(run()) for name, run in runs.items()}
    large = peaks(square, line, shape.dtype)
    times = alternate({**runs, **large}, range(timing.rounds), least_ms=timing.least_ms)
    held = {name: held_bytes(p.run, p.facts["extra_bytes"]) for name, p in programs.items()}
    held |= {name: peak_bytes(run) for name, run in peers.items()}
    flops = {name: p.facts["flops"] for name, p in programs.items()}
    flops |= {name: flops["full" if name == "torch_full" else "naive"] for name in peers}
    rate = 2 * square**3 / median(times["gemm"]) / 1e9  # TFLOP/s
    used = Counter(row.how for row in explain(adapted["ours"], base, factors, case.batch).rows)
    yield {
        **shape.facts(),
        "rank": rank,
        **_timed(times, runs, "ours"),
        **_facts(programs),
        "held_bytes": held,
        "rate_tflops": rate,
        "copy_gbytes": 2 * jnp.dtype(shape.dtype).itemsize * line / median(times["copy"]) / 1e6,
        "share_of_rate": {name: flops[name] / median(times[name]) / 1e9 / rate for name in runs},
        "sites": dict(used),
        "losses": losses,
        "compile_s": compile_s,
        "no_peer": lacking() if peer else "left out",
    }


def order_row(shape: Shape, *, timing: Timing, rank: int = 8) -> Iterator[dict[str, Any]]:
    """What recomputation (`adapt(recompute=...)`) and waiting (`after`) cost and save: our step with and without each.

    "ours" has both. Ratios are of ours against the others: above 1, leaving an order out is faster.
    """
    case, base, factors = _case(shape, rank)
    adapted = {
        name: adapt(case.apply, case.plan, recompute=recompute)
        for name, recompute in (("ours", True), ("no_recompute", False), ("no_wait", True), ("neither", False))
    }
    steps = {name: one for name, one in contenders(case, base, factors, adapted).items() if name in adapted}
    began = perf_counter()
    programs = step_programs(steps, case.batch, unordered=("no_wait", "neither"))
    compile_s = perf_counter() - began
    runs = {name: program.run for name, program in programs.items()}
    times = alternate(runs, range(timing.rounds), least_ms=timing.least_ms)
    held = {name: held_bytes(p.run, p.facts["extra_bytes"]) for name, p in programs.items()}
    yield {
        **shape.facts(),
        "rank": rank,
        **_timed(times, runs, "ours"),
        **_facts(programs),
        "held_bytes": held,
        "compile_s": compile_s,
    }


def _case(shape: Shape, rank: int) -> tuple[Case, Any, Any]:
    case = make_case(**shape._asdict(), rank=rank, targets="all-linear")
    return case, *split(case.params, case.plan, jax.random.key(1))


def _timed(times: Mapping[str, list[float]], names: Collection[str], one: str) -> dict[str, Any]:
    """Medians in ms, and ratios of `one` against each other name: median, lower and upper quartile."""
    ratios = {name: ratio(times, one, name) for name in names if name != one}
    return {
        "rounds": len(times[one]),
        "ms": {name: median(times[name]) for name in names},
        "ratio": {name: [r.median, *r.spread] for name, r in ratios.items()},
    }


def _facts(programs: Mapping[str, Program]) -> dict[str, Any]:
    words = ("flops", "bytes", "temp_bytes", "peak_bytes", "extra_bytes")
    return {word: {name: program.facts[word] for name, program in programs.items()} for word in words}
