"""Trials of different rank in one array: a rank-r trial is a rank-R trial whose last R - r rows are zero.

Zero rows have zero gradients, so they stay zero under AdamW; targets that a trial leaves out are sites whose rows are
all zero. `unpack` checks that they did. Which leaves have rows, a method says (`Method.rows`).
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

from lorax_kit.core.leaves import FullLeaf
from lorax_kit.core.merge import split
from lorax_kit.core.method import METHODS, frozen_leaves, leaf_shapes
from lorax_kit.core.paths import Params
from lorax_kit.core.plan import Plan, match
from lorax_kit.core.setting import Full, Setting
from lorax_kit.core.spec import Spec
from lorax_kit.errors import StudyError
from lorax_kit.problem import Problem
from lorax_kit.study.design import Study, Trial
from lorax_kit.transform.resolve import resolve


class Scalars(NamedTuple):
    """What differs between stacked trials beside their factors; each (trials,).

    Attributes:
      lr, scale: fp32.
      stream: int32, with a stream per seed, which of the stacked batches a trial reads.
      key: random keys, of the seeds, from which each step's are folded.
    """

    lr: Array
    scale: Array
    stream: Array
    key: Array


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
    """Trials that may share a stack: of one method, and for methods that train more than rows, one target set.

    The probe joins the first kind: it is a trial of rank 0.
    """
    grouped: dict[Any, list[Trial]] = {}
    for trial in trials:
        if trial.rank > 0:
            across = _rows_only(study.setting(trial))
            grouped.setdefault((trial.variant, None if across else trial.targets), []).append(trial)
    probes = [trial for trial in trials if trial.rank == 0]
    joined = next((kind for (_, targets), kind in grouped.items() if targets is None), None)
    if joined is not None:
        joined += probes
    elif probes:
        grouped["probe"] = probes
    return list(grouped.values())


def stacks(
    study: Study, problem: Problem, trials: Sequence[Trial], params: Params, batch: Any
) -> list[tuple[list[Trial], Plan]]:
    """The stacks of one kind of trials, each with its `union_plan`: those whose leaves differ in rows only share one.

    At another rank a method may hold other leaves, such as a dense matrix for factors. The probe joins the first.
    """
    plan = union_plan(study, problem, trials, params, batch)
    apart: dict[Any, list[Trial]] = {}
    for trial in sorted(trials, key=lambda trial: trial.rank == 0):
        form = _form(study, plan, trial) if trial.rank > 0 else next(iter(apart), None)
        apart.setdefault(form, []).append(trial)
    if len(apart) == 1:
        return [(list(trials), plan)]
    return [(some, union_plan(study, problem, some, params, batch)) for some in apart.values()]


def _form(study: Study, plan: Plan, trial: Trial) -> Any:
    """Which leaves a trial has at the sites of a plan, and the shapes of those that no zero rows extend."""
    setting = study.setting(trial)
    rows = METHODS[setting.kind].rows
    found = []
    for site in plan.sites:
        leaves = leaf_shapes(replace(site, setting=setting))._asdict()
        found.append(tuple(None if x is None else name in rows or (x.shape, x.dtype) for name, x in leaves.items()))
    return tuple(found)


def _rows_only(setting: Setting) -> bool:
    """Whether a site whose rows are all zero is one that is not adapted."""
    method = METHODS[setting.kind]
    return set(method.leaves._fields) <= method.rows | frozen_leaves(setting)


def union_plan(study: Study, problem: Problem, trials: Sequence[Trial], params: Params, batch: Any) -> Plan:
    """The plan of every site that any of the trials adapts, at their highest rank.

    Raises:
      PlanError: a pattern that matches nothing, a rank above min(in, out), a target that is never used.
    """
    rank = max(trial.rank for trial in trials)
    rules: list[tuple[str, Setting | Full]] = list(problem.whole_rules)
    if rank == 0:
        return resolve(Spec(rules), params, problem.apply, batch)
    adapted = [trial for trial in trials if trial.rank > 0]
    setting = study.setting(max(adapted, key=lambda trial: trial.rank))
    seen: dict[str, None] = {}
    for name in dict.fromkeys(trial.targets for trial in adapted):
        one = Spec([*rules, *((pattern, setting) for pattern in study.targets[name])])
        seen.update({path: None for path, s in match(one, params).items() if isinstance(s, Setting)})
    rules += [(f"re:{re.escape(path)}", setting) for path in seen]
    return resolve(Spec(rules), params, problem.apply, batch)


def trial_plan(study: Study, problem: Problem, plan: Plan, trial: Trial, params: Params) -> Plan:
    """The plan of one trial alone, from the union's."""
    spec = study.spec(trial, problem.whole_rules)
    settings = match(spec, params)
    chosen = ((site, settings.get(site.path)) for site in plan.sites)
    sites = tuple(replace(site, setting=s) for site, s in chosen if isinstance(s, Setting))
    return replace(plan, sites=sites, spec=spec)


def start(problem: Problem, plan: Plan, seed: int) -> tuple[Params, dict[str, Any]]:
    """(base, factors) of a trial before its first step: all that a seed decides, but the order of the data."""
    key = jax.random.key(seed)
    params = problem.params(jax.random.fold_in(key, 0))
    return split(params, plan, jax.random.fold_in(key, 1), hints=problem.hints)


def training_key(seed: int) -> Array:
    """The key of a trial's training steps; `start` folds the seed's other numbers."""
    return jax.random.fold_in(jax.random.key(seed), 2)


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
        key=jnp.stack([training_key(trial.seed) for trial in trials]),
    )
    return Pack(tuple(trials), plan, stacked, scalars)


def _padded(plan: Plan, path: str, leaves: Any) -> Any:
    """The leaves of a trial with zeros up to the sizes of the stack; all zeros where the trial leaves the site out."""
    if isinstance(leaves, FullLeaf):
        return leaves
    shapes = leaf_shapes(plan.site(path))
    if leaves is None:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    rows = METHODS[plan.site(path).setting.kind].rows
    for name, x in leaves._asdict().items():
        s = getattr(shapes, name)
        if (x is None) != (s is None) or (x is not None and name not in rows and x.shape != s.shape):
            have, want = ("none" if v is None else v.shape for v in (x, s))
            raise StudyError(
                f"trials of these ranks do not fit one stack: {name} at {path!r} is {have} in one, {want} in another.\n"
                "  pack those apart that `lorax_kit.study.packing.stacks` keeps apart"
            )
    return jax.tree.map(
        lambda x, s: jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, s.shape, strict=True)]) if x.ndim else x,
        leaves,
        shapes,
    )


def unpack(plan: Plan, factors: Any, index: int, *, diverged: bool = False) -> dict[str, Any]:
    """The factors of trial `index`, by its own plan: only its rows and its targets, as numpy arrays.

    Args:
      diverged: the trial is lost; what its other rows hold does not matter.

    Raises:
      StudyError: a row that should be zero is not; the optimiser does not keep zero rows.
    """
    out: dict[str, Any] = {}
    sites = {site.path: site for site in plan.sites}
    for path, stacked in factors.items():
        leaves = jax.tree.map(lambda x: np.asarray(x[index]), stacked)
        if isinstance(leaves, FullLeaf):
            out[path] = leaves
            continue
        site = sites.get(path)
        shapes = jax.tree.map(lambda x: x.shape, leaf_shapes(site)) if site else type(leaves)(*(None,) * len(leaves))
        own = {}
        for name, x, shape in zip(leaves._fields, leaves, shapes, strict=True):
            if x is None:
                continue
            inside = tuple(slice(n) for n in shape or (0,) * x.ndim)
            rest = x.copy()
            rest[inside] = 0
            if not diverged and np.any(rest):
                rank = site.rank if site else 0
                raise StudyError(
                    f"rows of {name} at {path!r} above rank {rank} are no longer zero: the optimiser moves zero rows."
                )
            own[name] = np.asarray(x[inside])
        if site:
            out[path] = leaves._replace(**own)
    return out
