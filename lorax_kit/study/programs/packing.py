"""Trials of different rank in one array: a rank-r trial is a rank-R trial whose last R - r rows are zero.

Zero rows have zero gradients, so they stay zero under AdamW; targets that a trial leaves out are sites whose rows are
all zero. `unpack` checks that they did. Which leaves have rows, a method says (`Method.rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.core.leaves import FullLeaf
from lorax_kit.core.merge import split
from lorax_kit.core.method import METHODS, leaf_shapes
from lorax_kit.core.paths import Params, flatten, unflatten
from lorax_kit.core.plan import Plan
from lorax_kit.errors import StudyError
from lorax_kit.problem import Problem
from lorax_kit.study.design.study import Study
from lorax_kit.study.design.trial import Trial
from lorax_kit.study.programs.forms import DEFAULT, Form, trial_plan
from lorax_kit.study.programs.optimiser import scalars_of


class Scalars(NamedTuple):
    """What differs between stacked trials beside their factors; each (trials,).

    Attributes:
      lr, scale, dropout: fp32.
      more: name -> fp32, what the optimiser and the loss read.
      rows: path -> leaf -> int32, how many of its rows are the trial's own; empty where no mask holds the others.
      stream: int32, with a stream per seed, which of the stacked batches a trial reads.
      key: random keys, of the seeds, from which each step's are folded.
    """

    lr: Array
    scale: Array
    dropout: Array
    stream: Array
    key: Array
    more: dict[str, Array]
    rows: dict[str, dict[str, Array]]


class Pack(NamedTuple):
    """Stacked trials.

    Attributes:
      trials: in the order of the stack; its other places hold copies of the last.
      plan: of all their sites, at the highest rank.
      factors: every leaf with a leading trial axis.
      scalars: per-trial rates and scales.
    """

    trials: tuple[Trial, ...]
    plan: Plan
    factors: Any
    scalars: Scalars


def start(problem: Problem, plan: Plan, seed: int, base: Params | None = None) -> tuple[Params, dict[str, Any]]:
    """(base, factors) of a trial before its first step: all that a seed decides, but the order of the data.

    Args:
      base: the shared one, where it is not as the problem gives it: cast or quantised. Its head is not the seed's.
    """
    key = jax.random.key(seed)
    params = problem.params(jax.random.fold_in(key, 0))
    if base is not None:
        shared, treedef = flatten(base)
        whole = {leaf.path for leaf in plan.full}
        own = {path: x if path in whole else shared[path] for path, x in flatten(params)[0].items()}
        params = unflatten(own, treedef)
    return split(params, plan, jax.random.fold_in(key, 1), hints=problem.hints)


def training_key(seed: int) -> Array:
    """The key of a trial's training steps; `start` folds the seed's other numbers."""
    return jax.random.fold_in(jax.random.key(seed), 2)


def pack(
    study: Study,
    problem: Problem,
    trials: Sequence[Trial],
    plan: Plan,
    params: Params,
    form: Form = DEFAULT,
    size: int | None = None,
) -> Pack:
    """Stack the trials' starting points on one axis, of length `size`; None: of as many as there are."""
    stacks, scales, rows = [], [], []
    for trial in trials:
        own = trial_plan(study, problem, plan, trial, params)
        _, factors = start(problem, own, trial.seed, params)
        stacks.append({path: _padded(plan, path, factors.get(path)) for path in plan.trained})
        scales.append(own.sites[0].scale if own.sites else 0.0)
        rows.append(_rows(plan, factors) if form.held else {})
    places = [*range(len(trials)), *[len(trials) - 1] * ((size or 0) - len(trials))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([leaves[i] for i in places]), *stacks)
    everyone = [trials[i] for i in places]
    more = [scalars_of(trial) for trial in everyone]
    scalars = Scalars(
        lr=jnp.asarray([trial.lr for trial in everyone], jnp.float32),
        scale=jnp.asarray([scales[i] for i in places], jnp.float32),
        dropout=jnp.asarray([trial.dropout for trial in everyone], jnp.float32),
        stream=jnp.asarray([study.stream_of(trial) for trial in everyone], jnp.int32),
        key=jnp.stack([training_key(trial.seed) for trial in everyone]),
        more={name: jnp.asarray([one[name] for one in more], jnp.float32) for name in more[0]},
        rows=jax.tree.map(lambda *counts: jnp.asarray([counts[i] for i in places], jnp.int32), *rows),
    )
    return Pack(tuple(trials), plan, stacked, scalars)


def _rows(plan: Plan, factors: Any) -> dict[str, dict[str, int]]:
    """How many rows of each leaf a trial has of its own, none where it leaves a site out."""
    out: dict[str, dict[str, int]] = {}
    for site in plan.sites:
        leaves = factors.get(site.path)
        rows = METHODS[site.setting.kind].rows
        shapes = leaf_shapes(site)._asdict()
        out[site.path] = {
            name: 0 if leaves is None else getattr(leaves, name).shape[0]
            for name, shape in shapes.items()
            if name in rows and shape is not None
        }
    return out


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
                "  pack those apart that `lorax_kit.study.programs.forms.stacks` keeps apart"
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
        trimmed = {}
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
            trimmed[name] = np.asarray(x[inside])
        if site:
            out[path] = leaves._replace(**trimmed)
    return out
