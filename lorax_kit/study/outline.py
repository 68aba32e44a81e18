"""What a study would do, before anything runs: programs, trials, parameters, memory, FLOPs and time."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
from jax.sharding import Mesh

from lorax_kit.core.leaves import trained_only
from lorax_kit.core.paths import Params
from lorax_kit.measure import matrix_rate, traced_flops
from lorax_kit.problem import Problem
from lorax_kit.problem.base import based
from lorax_kit.study.design.study import Study
from lorax_kit.study.machines import machines_of, team_of
from lorax_kit.study.plan import planned_stacks
from lorax_kit.study.programs.forms import Examples, Stack, trial_plan
from lorax_kit.study.programs.groups import grouped
from lorax_kit.study.programs.packing import pack, start
from lorax_kit.study.programs.steps import programs
from lorax_kit.study.running.cluster import Workers

SHARE_OF_RATE = 0.5
"""Of the rate of a large matrix product, what a training step is taken to reach."""


def outline(
    study: Study,
    problem: Problem,
    *,
    mesh: Mesh | None = None,
    workers: int | Workers | None = None,
    memory_bytes: int | None = None,
    done: Collection[str] = (),
) -> dict[str, Any]:
    """Plan a study without training it.

    Args:
      mesh, workers, memory_bytes: as `lk.run` takes them; each worker is taken to be as fast as this process.
      done: names of trials that are finished.

    Returns:
      {"trials": names, "programs": [{trials, sizes of groups, method, optimizer, ranks, params, estimated_bytes,
      flops_per_step, expected_seconds}], and the totals "flops", "expected_seconds"}. Bytes are of a step beyond the
      base, FLOPs of the products of a group's step, and seconds those FLOPs at half the rate of a large matrix product,
      without compilation and tests. With a rule that stops trials early both totals are those of nobody stopping.

    Raises:
      StudyError, PlanError: what `lk.run` raises before it trains.
    """
    params = problem.params(jax.random.key(0))
    examples, left = Examples(study, problem), [t for t in study.trials() if t.name not in done]
    budget, devices, parts = machines_of(mesh, team_of(workers), memory_bytes)
    rows: list[dict[str, Any]] = []
    rate = SHARE_OF_RATE * matrix_rate() * (1 if mesh is None else mesh.devices.size)
    for stack in planned_stacks(study, problem, left, params, examples) if left else []:
        base = based(params, stack.form.dtype, None, ())
        batch = examples(stack.form)
        groups = grouped(study, problem, stack, base, batch, budget=budget, devices=devices, parts=parts)
        flops = _flops(study, problem, stack, base, batch, groups[0].size)
        sizes = [_trained(study, problem, stack, trial, base) for trial in _one_of_each_rank(stack)]
        adapted = [trial for trial in stack.trials if trial.rank > 0]
        rows.append(
            {
                "trials": len(stack.trials),
                "groups": [len(group.trials) for group in groups],
                "method": adapted[0].variant if adapted else "probe",
                "optimizer": stack.form.recipe.name,
                "ranks": sorted({trial.rank for trial in stack.trials}),
                "params": [min(sizes), max(sizes)],
                "estimated_bytes": groups[0].estimated_bytes,
                "flops_per_step": flops,
                "expected_seconds": flops * study.steps * -(-len(groups) // parts) / rate,
            }
        )
    return {
        "trials": [trial.name for trial in left],
        "programs": rows,
        "flops": sum(row["flops_per_step"] * study.steps * len(row["groups"]) for row in rows),
        "expected_seconds": sum(row["expected_seconds"] for row in rows),
        "budget_bytes": budget,
    }


def _flops(study: Study, problem: Problem, stack: Stack, base: Params, batch: Any, size: int) -> int:
    made = programs(study, problem, stack.plan, size, form=stack.form)
    shapes = jax.eval_shape(lambda: pack(study, problem, stack.trials[:1], stack.plan, base, stack.form)[2:])
    factors, scalars = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), shapes)
    running = jax.eval_shape(made.init, factors, scalars)
    if study.stream == "seed":
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(study.streams), *x.shape), x.dtype), batch)
    return traced_flops(jax.make_jaxpr(made.step)(running, scalars, base, batch))


def _one_of_each_rank(stack: Stack) -> list[Any]:
    return list({trial.rank: trial for trial in stack.trials}.values())


def _trained(study: Study, problem: Problem, stack: Stack, trial: Any, base: Params) -> int:
    plan = trial_plan(study, problem, stack.plan, trial, base)
    factors = jax.eval_shape(lambda: start(problem, plan, trial.seed, base)[1])
    return sum(x.size for x in jax.tree.leaves(trained_only(plan, factors)))
