"""Trials of different rank in one array: a rank-r trial is a rank-R trial whose last R - r rows are zero.

Zero rows of both factors have zero gradients, so they stay zero under AdamW; targets that a trial leaves out
are sites whose rows are all zero. `unpack` checks that they did.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.core.errors import StudyError
from lorax_kit.core.factors import Factors, FullLeaf
from lorax_kit.core.merge import split
from lorax_kit.core.paths import Params
from lorax_kit.core.plan import Plan, match
from lorax_kit.core.spec import Full, LoRA, Spec
from lorax_kit.study.design import Study, Trial
from lorax_kit.study.problem import Problem
from lorax_kit.transform.resolve import resolve


class Scalars(NamedTuple):
    """What differs between stacked trials beside their factors; each (trials,).

    Attributes:
      lr, scale: fp32.
      stream: int32, with a stream per seed, which of the stacked batches a trial reads.
    """

    lr: Array
    scale: Array
    stream: Array


class Pack(NamedTuple):
    """Stacked trials.

    Attributes:
      trials: in the order of the stack.
      plan: of all their sites, at the highest rank.
      factors: every leaf with a leading trial axis.
      scalars: per-trial rates and scales.
    """

    trials: tuple[Trial, ...]
    plan: Plan
    factors: Any
    scalars: Scalars


def kinds(study: Study, trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials that may share a stack: of one variant, and for variants that train more than rows, one target set.

    The probe joins the first kind: it is a trial of rank 0.
    """
    grouped: dict[Any, list[Trial]] = {}
    for trial in trials:
        if trial.rank > 0:
            key = (trial.variant, None if trial.variant == "lora" else trial.targets)
            grouped.setdefault(key, []).append(trial)
    probes = [trial for trial in trials if trial.rank == 0]
    lora = grouped.get(("lora", None))
    if lora is not None:
        lora += probes
    elif probes:
        grouped["probe"] = probes
    return list(grouped.values())


def union_plan(study: Study, problem: Problem, trials: Sequence[Trial], params: Params, batch: Any) -> Plan:
    """The plan of every site that any of the trials adapts, at their highest rank.

    Raises:
      PlanError: a pattern that matches nothing, a rank above min(in, out), a target that is never used.
    """
    rank = max(trial.rank for trial in trials)
    rules: list[tuple[str, LoRA | Full]] = [(pattern, Full()) for pattern in problem.head]
    if rank == 0:
        return resolve(Spec(rules), params, problem.apply, batch)
    adapted = [trial for trial in trials if trial.rank > 0]
    setting = LoRA(rank=rank, variant=adapted[0].variant, init=study.init, rslora=study.rslora)
    seen: dict[str, None] = {}
    for name in dict.fromkeys(trial.targets for trial in adapted):
        one = Spec([*rules, *((pattern, setting) for pattern in study.targets[name])])
        seen.update({path: None for path, s in match(one, params).items() if isinstance(s, LoRA)})
    rules += [(f"re:{re.escape(path)}", setting) for path in seen]
    return resolve(Spec(rules), params, problem.apply, batch)


def trial_plan(study: Study, problem: Problem, plan: Plan, trial: Trial, params: Params) -> Plan:
    """The plan of one trial alone, from the union's."""
    settings = match(study.spec(trial, problem.head), params)
    chosen = ((site, settings.get(site.path)) for site in plan.sites)
    return replace(plan, sites=tuple(replace(site, setting=s) for site, s in chosen if isinstance(s, LoRA)))


def start(problem: Problem, plan: Plan, seed: int) -> tuple[Params, dict[str, Factors | FullLeaf]]:
    """(base, factors) of a trial before its first step: all that a seed decides, but the order of the data."""
    key = jax.random.key(seed)
    return split(problem.params(jax.random.fold_in(key, 0)), plan, jax.random.fold_in(key, 1))


def pack(study: Study, problem: Problem, trials: Sequence[Trial], plan: Plan, params: Params) -> Pack:
    """Stack the trials' starting points on one axis."""
    stacks, scales = [], []
    for trial in trials:
        own = trial_plan(study, problem, plan, trial, params)
        _, factors = start(problem, own, trial.seed)
        stacks.append({path: _padded(plan, path, factors.get(path)) for path in plan.trained})
        scales.append(own.sites[0].scale if own.sites else 0.0)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacks)
    scalars = Scalars(
        lr=jnp.asarray([trial.lr for trial in trials], jnp.float32),
        scale=jnp.asarray(scales, jnp.float32),
        stream=jnp.asarray([study.stream_of(trial) for trial in trials], jnp.int32),
    )
    return Pack(tuple(trials), plan, stacked, scalars)


def _padded(plan: Plan, path: str, factors: Factors | FullLeaf | None) -> Factors | FullLeaf:
    if isinstance(factors, FullLeaf):
        return factors
    site = plan.site(path)
    dtype = jnp.dtype(site.setting.dtype)
    if factors is None:
        return Factors(jnp.zeros(site.a_shape, dtype), jnp.zeros(site.b_shape, dtype))

    def rows(x: Array) -> Array:
        return jnp.pad(x, [(0, site.setting.rank - x.shape[0])] + [(0, 0)] * (x.ndim - 1))

    return factors._replace(a=rows(factors.a), b=rows(factors.b))


def unpack(plan: Plan, factors: Any, index: int, *, diverged: bool = False) -> dict[str, Factors | FullLeaf]:
    """The factors of trial `index`, by its own plan: only its rows and its targets, as numpy arrays.

    Args:
      diverged: the trial is lost; what its other rows hold does not matter.

    Raises:
      StudyError: a row that should be zero is not; the optimiser does not keep zero rows.
    """
    out: dict[str, Factors | FullLeaf] = {}
    ranks = {site.path: site.setting.rank for site in plan.sites}
    for path, leaf in factors.items():
        one = jax.tree.map(lambda x: np.asarray(x[index]), leaf)
        if isinstance(one, FullLeaf):
            out[path] = one
            continue
        rank = ranks.get(path, 0)
        if not diverged and (np.any(one.a[rank:]) or np.any(one.b[rank:])):
            raise StudyError(f"rows of {path!r} above rank {rank} are no longer zero: the optimiser moves zero rows.")
        if rank:
            out[path] = one._replace(a=one.a[:rank], b=one.b[:rank])
    return out
