"""A study's trials stacked in one program, against the same trials one after the other: ours, and PEFT's on torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import jax
from tqdm import tqdm

from lorax_kit.benchmarks.case import TARGETS, Case, make_case
from lorax_kit.benchmarks.steps.step import RATE, stepping
from lorax_kit.benchmarks.timing import alternate
from lorax_kit.benchmarks.torch_peer import torch_steps
from lorax_kit.core.merge import split
from lorax_kit.measure import facts, product_flops
from lorax_kit.study.design.study import Study
from lorax_kit.study.design.trial import Trial
from lorax_kit.study.programs.engine import Engine
from lorax_kit.study.programs.forms import DEFAULT, Stack, trial_plan, union_plan
from lorax_kit.study.programs.groups import available_bytes, grouped
from lorax_kit.study.programs.packing import pack, start
from lorax_kit.study.programs.steps import optimizer, programs
from lorax_kit.training import make_step
from lorax_kit.transform import adapt

RANKS = (1, 2, 4, 8, 16, 32)
STUDY_COLUMNS = (
    "trials", "steps", "ours_s", "compile_s", "solo_s", "solo_compile_each_s", "peft_s", "ratio_solo",
    "ratio_compile_each", "ratio_peft", "ratio_upper_layers",
)  # fmt: skip
PEFT_RANK = 8


def bench_study(
    *,
    width: int = 384,
    layers: int = 6,
    batch_size: int = 16,
    length: int = 32,
    steps: int = 40,
    rounds: int = 5,
    peer: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Time 24 trials (ranks 1 to 32, two rates, two seeds) of an all-linear study of a BERT classifier.

    One step of each contender is timed in alternating rounds; times of whole studies are sums of medians, with the
    compilations that each way needs: `ours_s` one program for all trials, `solo_s` one program for a trial padded to
    the highest rank that runs 24 times, `solo_compile_each_s` a program for each rank, `peft_s` 24 trials of PEFT at
    rank 8 in eager torch. Solo programs are `lk.make_step` of one trial, without a trial axis.
    `compile_s` is the share of `ours_s` that compiles. Trials are laid out as a study lays them, `*_at_once` side by
    side. `ratio_upper_layers` is a stacked step per trial against a solo step of the highest rank, of adapters in the
    top third of the layers, without compilations.

    Returns:
      A dict with `STUDY_COLUMNS`, the milliseconds of each step, FLOPs of the products, temporaries, and the device.
    """
    case = make_case(
        width=width, layers=layers, batch_size=batch_size, length=length, rank=max(RANKS), targets="all-linear"
    )
    top = ",".join(str(i) for i in range(layers - max(layers // 3, 1), layers))
    everywhere = _Way(case, TARGETS["all-linear"])
    upper = _Way(case, f"encoder/layer_{{{top}}}/**/kernel" if "," in top else f"encoder/layer_{top}/**/kernel")
    trials = everywhere.study.trials()
    runs: dict[str, Callable[[], Any]] = {}
    compiled: dict[str, float] = {}
    costs: dict[str, Any] = {}
    wanted: dict[str, Callable[[], tuple[Callable[[], Any], dict[str, Any]]]] = {
        "stacked": lambda: everywhere.stacked(trials),
        "upper": lambda: upper.stacked(upper.study.trials()),
        "upper_solo": lambda: upper.solo(max(RANKS)),
        **{str(rank): partial(everywhere.solo, rank) for rank in RANKS},
    }
    for name, make in tqdm(wanted.items(), desc="compiling", disable=None if progress else True):
        runs[name], costs[name] = make()
        compiled[name] = costs[name]["compile_s"]
    _, factors = split(case.params, trial_plan_of(everywhere, PEFT_RANK), jax.random.key(0))
    peft_case = case._replace(plan=trial_plan_of(everywhere, PEFT_RANK))
    torch = torch_steps(peft_case, factors, RATE) if peer else {}
    runs |= {"peft": torch["peft"]} if "peft" in torch else {}
    bar = tqdm(range(rounds), desc=f"{len(trials)} trials", disable=None if progress else True)
    seconds = {name: median(times) / 1e3 for name, times in alternate(runs, bar).items()}
    count, each = len(trials), len(trials) // len(RANKS)
    ours = compiled["stacked"] + steps * seconds["stacked"]
    padded = str(max(RANKS))
    solo = compiled[padded] + count * steps * seconds[padded]
    by_rank = sum(compiled[str(r)] + each * steps * seconds[str(r)] for r in RANKS)
    peft = count * steps * seconds["peft"] if "peft" in seconds else None
    return {
        "trials": count,
        "steps": steps,
        "ours_s": ours,
        "compile_s": compiled["stacked"],
        "solo_s": solo,
        "solo_compile_each_s": by_rank,
        "peft_s": peft,
        "ratio_solo": ours / solo,
        "ratio_compile_each": ours / by_rank,
        "ratio_peft": None if peft is None else ours / peft,
        "ratio_upper_layers": seconds["upper"] / count / seconds["upper_solo"],
        "step_ms": {name: 1e3 * x for name, x in seconds.items()},
        "solo_temp_bytes": costs[padded]["temp_bytes"],
        **{f"{name}_{key}": x for name in ("stacked", "upper") for key, x in costs[name].items()},
        "width": width,
        "tokens": batch_size * length,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


class _Way:
    """The study over one set of targets, and its programs."""

    def __init__(self, case: Case, targets: str) -> None:
        self.case = case
        self.study = Study(rank=RANKS, alpha=16, lr=(RATE, 3 * RATE), seed=(0, 1), targets={"all": [targets]})
        self.problem = case.problem()
        self.plan = union_plan(self.study, self.problem, self.study.trials(), case.params, case.batch)

    def stacked(self, trials: Sequence[Trial]) -> tuple[Callable[[], Any], dict[str, Any]]:
        """The compiled step of trials, laid out as a study lays them, as a call, with its FLOPs and temporaries."""
        case, stack = self.case, Stack(list(trials), self.plan, DEFAULT)
        budget = available_bytes(jax.devices()[0])
        group = grouped(self.study, self.problem, stack, case.params, case.batch, budget=budget)[0]
        engine = Engine(self.study, self.problem, self.plan, case.params, group.layout)
        packed = pack(self.study, self.problem, trials, self.plan, case.params)
        running, scalars, count = engine.begin(packed)
        step = engine.compile(running, scalars, count, case.batch)
        made = programs(self.study, self.problem, self.plan, len(trials))
        flops = product_flops(
            made.step, made.init(packed.factors, packed.scalars), packed.scalars, case.params, case.batch
        )

        def call(running: Any, base: Any, batch: Any) -> Any:
            return step(running, scalars, count, base, batch)

        costs = {
            "compile_s": engine.compile_seconds,
            "flops": flops,
            "temp_bytes": facts(step)["temp_bytes"],
            "at_once": group.layout.at_once,
            "estimated_bytes": group.estimated_bytes,
            "state_bytes": sum(x.nbytes for x in jax.tree.leaves(running)),
        }
        return stepping(call, running, engine.base, case.batch), costs

    def solo(self, rank: int) -> tuple[Callable[[], Any], dict[str, Any]]:
        """The compiled step of a trial alone, at its own rank, and what it cost to compile."""
        case, plan = self.case, trial_plan_of(self, rank)
        base, factors = start(self.problem, plan, 0)
        adapted = adapt(case.apply, plan)

        def loss(base: Any, factors: Any, batch: Any) -> Any:
            return case.loss(adapted(base, factors, batch), batch)

        init, step = make_step(loss, optimizer(self.study, plan, RATE), jit=False)
        state = init(factors)
        began = perf_counter()
        compiled = jax.jit(step, donate_argnums=(0,)).lower(state, base, case.batch).compile()
        seconds = perf_counter() - began
        return stepping(compiled, state, base, case.batch), {"compile_s": seconds, **facts(compiled)}


def trial_plan_of(way: _Way, rank: int) -> Any:
    """The plan of one trial of a rank, alone."""
    trial = Trial(rank=rank, alpha=16.0, lr=RATE, seed=0, targets="all")
    return trial_plan(way.study, way.problem, way.plan, trial, way.case.params)
