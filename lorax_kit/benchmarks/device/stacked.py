"""Trials of different rank in one program against each alone, and their memory against what a study estimates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from statistics import median
from typing import Any

import jax

from lorax_kit.benchmarks.case import TARGETS, Case, make_case
from lorax_kit.benchmarks.device.machine import held_bytes
from lorax_kit.benchmarks.device.steps import Program, Shape, Timing, compiled_programs
from lorax_kit.benchmarks.steps.step import RATE, stepping
from lorax_kit.benchmarks.timing import alternate, ratio
from lorax_kit.core.plan import Plan
from lorax_kit.problem import Problem
from lorax_kit.study.design import Study
from lorax_kit.study.design.trial import Trial
from lorax_kit.study.programs.forms import DEFAULT, Stack, trial_plan, union_plan
from lorax_kit.study.programs.groups import available_bytes, pack_bytes
from lorax_kit.study.programs.packing import pack, start
from lorax_kit.study.programs.steps import optimizer, programs
from lorax_kit.training import make_step
from lorax_kit.transform import adapt

RANKS = (1, 2, 4, 8, 16)


class Stacks:
    """Stacks of one model's trials, whose ranks cycle through `RANKS`; the solo programs are compiled once.

    Args:
      shape: of the model and its batch.
      timing: how long to measure.
    """

    def __init__(self, shape: Shape, timing: Timing) -> None:
        self.shape, self.timing = shape, timing
        self.study = Study(rank=RANKS, alpha=16, lr=RATE, targets={"all": [TARGETS["all-linear"]]})
        self._solos: dict[int, Program] = {}

    @cached_property
    def case(self) -> Case:
        """The model, its params and its batch."""
        return make_case(**self.shape._asdict(), rank=max(RANKS), targets="all-linear")

    @cached_property
    def problem(self) -> Problem:
        """The case as a study takes it."""
        return self.case.problem()

    def rows(self, count: int) -> Iterator[dict[str, Any]]:
        """The row of a stack of `count`, and that of its memory. Where the estimate does not fit, only the latter."""
        case, study, problem = self.case, self.study, self.problem
        ranks = [RANKS[i % len(RANKS)] for i in range(count)]
        trials = [Trial(rank=r, alpha=16.0, lr=RATE, seed=i // len(RANKS), targets="all") for i, r in enumerate(ranks)]
        plan = union_plan(study, problem, trials, case.params, case.batch)
        estimated = pack_bytes(study, problem, Stack(trials, plan, DEFAULT), case.params, case.batch, count)
        available = available_bytes(jax.devices()[0])
        memory = {"row": "memory", **self.shape.facts(), "trials": count, "estimated_bytes": estimated}
        memory |= {"available_bytes": available}
        if estimated > available:
            yield memory | {"skipped": f"{count} trials need more than the {available} bytes that a study would use"}
            return
        stacked = pack(study, problem, trials, plan, case.params)
        base, _ = start(problem, plan, 0)
        made = programs(study, problem, plan, count)
        running = jax.jit(made.init)(stacked.factors, stacked.scalars)
        state = sum(x.nbytes for x in jax.tree.leaves(running))
        step = jax.jit(made.step, donate_argnums=(0,)).trace(running, stacked.scalars, base, case.batch)
        solos = self._solo_programs(sorted(set(ranks)), plan)

        def call(compiled: Any) -> Callable[[], Any]:
            def one(running: Any, base: Any, batch: Any) -> Any:
                return compiled(running, stacked.scalars, base, batch)

            return stepping(one, running, base, case.batch)

        program = compiled_programs({"stacked": (step, call)})["stacked"]
        solo = {str(rank): one.run for rank, one in solos.items()}
        times = alternate({"stacked": program.run, **solo}, range(self.timing.rounds), least_ms=self.timing.least_ms)
        times["solo"] = [sum(times[str(rank)][i] for rank in ranks) for i in range(self.timing.rounds)]
        against = ratio(times, "stacked", "solo")
        yield {
            **self.shape.facts(),
            "trials": count,
            "ranks": sorted(set(ranks)),
            "rounds": self.timing.rounds,
            "stacked_ms": median(times["stacked"]),
            "ms_per_trial": median(times["stacked"]) / count,
            "solo_ms_per_trial": median(times["solo"]) / count,
            "ratio": [against.median, *against.spread],
            "flops": program.facts["flops"],
            "solo_flops": sum(solos[rank].facts["flops"] for rank in ranks),
        }
        held = held_bytes(program.run, program.facts["extra_bytes"])
        xla = program.facts["extra_bytes"] + state
        yield memory | {
            "temp_bytes": program.facts["temp_bytes"],
            "xla_bytes": xla,
            "held_bytes": None if held is None else held + state,
            "estimate_over_xla": estimated / xla,
        }

    def _solo_programs(self, ranks: list[int], plan: Plan) -> dict[int, Program]:
        """The step of a trial alone, by rank."""
        traced = {}
        for rank in ranks:
            if rank not in self._solos:
                traced[str(rank)] = self._solo(rank, plan)
        self._solos |= {int(rank): program for rank, program in compiled_programs(traced).items()}
        return {rank: self._solos[rank] for rank in ranks}

    def _solo(self, rank: int, plan: Plan) -> tuple[Any, Callable[[Any], Callable[[], Any]]]:
        case, problem = self.case, self.problem
        trial = Trial(rank=rank, alpha=16.0, lr=RATE, seed=0, targets="all")
        rank_plan = trial_plan(self.study, problem, plan, trial, case.params)
        base, factors = start(problem, rank_plan, 0)
        adapted = adapt(problem.apply, rank_plan)

        def loss(base: Any, factors: Any, batch: Any) -> Any:
            return problem.loss(adapted(base, factors, batch), batch)

        init, step = make_step(loss, optimizer(self.study, rank_plan, RATE), jit=False)
        state = init(factors)
        traced = jax.jit(step, donate_argnums=(0,)).trace(state, base, case.batch)
        return traced, lambda compiled: stepping(compiled, state, base, case.batch)
