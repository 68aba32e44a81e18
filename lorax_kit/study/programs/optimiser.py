"""The optimiser of a study's trials: by name, with scalars that are traced, and how it treats rows of zeros.

A rank-r trial in a stack of rank R has R - r rows of zeros. Most optimisers keep them at zero and move the other rows
as if they were alone (AdamW, SGD with momentum, Lion). Some move zero rows (noise, say): a mask holds them. Some mix
the rows of a leaf (Adafactor's norms, Muon's orthogonalisation): their trials share a program with trials of the same
rank only. Which it is, is measured on the shapes of a site.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from lorax_kit.core.method import METHODS, leaf_shapes
from lorax_kit.core.plan import Plan
from lorax_kit.core.specs.setting import shown
from lorax_kit.errors import LoraxError, StudyError
from lorax_kit.study.design.study import Study
from lorax_kit.study.design.trial import Trial
from lorax_kit.training.optimisers.extra import extra_arguments
from lorax_kit.training.optimisers.lora_plus import lora_plus
from lorax_kit.training.optimisers.partition import partition

SIZES = (1e-4, 1.0, 1e4)
"""Of gradients with which the treatment of rows is measured."""
STEPS = 3
"""Updates over which the treatment of rows is measured: states need two to show in the third."""


class Recipe(NamedTuple):
    """What of the optimiser a compiled program is made for; the scalars' values are traced.

    Attributes:
      name: of the optimiser.
      reads: keywords that it is given as traced scalars.
      static: (keyword, value) of those that it cannot take traced.
      ratio: whether leaves on the side of the outputs have a rate of their own.
      loss: keywords that the problem's loss is given as traced scalars.
    """

    name: str = "adamw"
    reads: tuple[str, ...] = ("weight_decay",)
    static: tuple[tuple[str, float], ...] = ()
    ratio: bool = False
    loss: tuple[str, ...] = ()


def maker(study: Study, name: str) -> Callable[..., Any]:
    """The function that makes an optimiser: (learning rate by step, **keywords) -> an optax transformation.

    Raises:
      StudyError: a name that stands for none.
    """
    if name in study.makers:
        return study.makers[name]
    made: Any
    if ":" in name:
        module, _, path = name.partition(":")
        try:
            made = importlib.import_module(module)
            for part in path.split("."):
                made = getattr(made, part)
        except (ImportError, AttributeError) as e:
            raise StudyError(f"optimizer {name!r} cannot be imported: {e}.") from None
        if callable(made):
            return made  # type: ignore[no-any-return]
    made = getattr(optax, name, None) or getattr(optax.contrib, name, None)
    if not callable(made) or "learning_rate" not in keywords_of(made):
        raise StudyError(
            f"optimizer {shown(name)} is no optimiser of optax or optax.contrib: nothing of that name takes a "
            "learning_rate.\n  give the name of one, 'module:function', or the function itself"
        )
    return made  # type: ignore[no-any-return]


def keywords_of(fn: Callable[..., Any], skip: int = 0) -> set[str]:
    """The names that a function takes as keywords, after its first `skip` parameters."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())[skip:]
    except (TypeError, ValueError):
        return set()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in parameters if p.kind in kinds}


def recipe_of(study: Study, trial: Trial, loss_reads: frozenset[str] = frozenset()) -> Recipe:
    """How the optimiser of a trial is made.

    Args:
      loss_reads: keywords that the problem's loss reads.

    Raises:
      StudyError: no such optimiser, or a scalar that neither it nor the loss reads.
    """
    accepted = keywords_of(maker(study, trial.optimizer))
    for name, _ in trial.hyper:
        if name not in accepted | loss_reads:
            raise StudyError(
                f"study hyper {name!r} is read by nothing: optimizer {trial.optimizer!r} has no such keyword, nor has "
                "the problem's loss.\n  name a keyword of one of them"
            )
    if trial.weight_decay and "weight_decay" not in accepted:
        raise StudyError(
            f"study weight_decay is {trial.weight_decay:g}, and optimizer {trial.optimizer!r} has none.\n"
            "  leave it out, or choose another optimiser"
        )
    wanted = [name for name, _ in trial.hyper if name in accepted]
    wanted += ["weight_decay"] if "weight_decay" in accepted else []
    static = [name for name in wanted if not _takes_traced(study, trial, name)]
    values = scalars_of(trial)
    return Recipe(
        name=trial.optimizer,
        reads=tuple(name for name in wanted if name not in static),
        static=tuple((name, values[name]) for name in static),
        loss=tuple(name for name, _ in trial.hyper if name in loss_reads),
    )


def scalars_of(trial: Trial) -> dict[str, float]:
    """The scalars of a trial that are no axis of its factors, by name."""
    return {"weight_decay": trial.weight_decay, "lr_ratio": trial.lr_ratio, **dict(trial.hyper)}


def _takes_traced(study: Study, trial: Trial, name: str) -> bool:
    """Whether an optimiser takes a scalar as a traced array: some compare it in Python."""
    fixed = {k: v for k, v in scalars_of(trial).items() if k in keywords_of(maker(study, trial.optimizer))}

    def update(value: Array, x: Array) -> Any:
        tx = maker(study, trial.optimizer)(1e-3, **fixed | {name: value})
        extra = extra_arguments(jnp.float32(0), x, lambda p: jnp.sum(p), lambda p: p)
        state = tx.init(x)
        tx = optax.with_extra_args_support(tx)
        return tx.update(x, state, x, **extra)[0]

    try:
        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(update, jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((4, 3), jnp.float32))
    except (jax.errors.ConcretizationTypeError, TypeError, ValueError):
        return False
    return True


def transformation(
    study: Study, plan: Plan, recipe: Recipe, rate: Callable[[Array], Array], scalars: Mapping[str, Any]
) -> optax.GradientTransformation:
    """The optimiser of one trial over the factors of `plan`.

    Args:
      rate: the learning rate by step.
      scalars: name -> value of what the recipe reads, and "lr_ratio"; they may be traced.
    """
    given = {name: scalars[name] for name in recipe.reads} | dict(recipe.static)
    tx = maker(study, recipe.name)(rate, **given)
    if recipe.ratio and plan.sites:
        tx = lora_plus(tx, plan, ratio=scalars["lr_ratio"])
    return partition(tx, plan, clip=study.clip)


def rows_treatment(study: Study, plan: Plan, trials: Sequence[Trial], recipe: Recipe) -> str:
    """How the optimiser treats rows of zeros: "kept" at zero, "held" there by a mask, or "mixed" with the others.

    Three updates of a leaf of the first site at the lowest rank are compared with those at the highest rank whose last
    rows, and their gradients, are zero: for the scalars of every trial and for gradients of several sizes, since a
    clip, or noise of some size, acts for some of them alone. The worst answer counts.

    Args:
      trials: of rank above 0 that would share a stack.
    """
    largest = max(trials, key=lambda trial: trial.rank)
    low, high = min(trial.rank for trial in trials), largest.rank
    if low == high or not plan.sites:
        return "kept"
    shapes = {}
    for rank in (low, high):
        setting = study.setting(largest).of_rank(rank)  # type: ignore[attr-defined]
        shapes[rank] = leaf_shapes(replace(plan.sites[0], setting=setting))._asdict()
    rows = METHODS[largest.variant].rows
    values = {name: [scalars_of(trial)[name] for trial in trials] for name in recipe.reads}
    points = sorted(set(zip(*values.values(), strict=True))) or [()]
    cases = [dict(zip(values, point, strict=True)) | {"size": size} for point in points for size in SIZES]
    rng = np.random.default_rng(0)
    kept = True
    for name, small in shapes[low].items():
        large = shapes[high].get(name)
        if name not in rows or small is None or large is None:
            continue
        params = rng.normal(size=small.shape).astype(np.float32)
        grads = rng.normal(size=(STEPS, *small.shape)).astype(np.float32)
        pad = [(0, n - m) for m, n in zip(small.shape, large.shape, strict=True)]
        alone = _moved(study, recipe, params, grads, cases)
        stacked = _moved(study, recipe, np.pad(params, pad), np.pad(grads, [(0, 0), *pad]), cases)
        inside = (slice(None), *(slice(n) for n in small.shape))
        if not np.allclose(stacked[inside], alone, rtol=1e-4, atol=1e-7, equal_nan=True):
            return "mixed"
        rest = stacked.copy()
        rest[inside] = 0
        kept &= not rest.any()
    return "kept" if kept else "held"


def _moved(
    study: Study, recipe: Recipe, params: np.ndarray, grads: np.ndarray, cases: Sequence[Mapping[str, float]]
) -> np.ndarray:
    """(cases, *shape): where updates take a leaf, for each case's scalars and size of its gradients."""

    @jax.jit
    def run(params: Array, grads: Array, cases: Any) -> Array:
        def one(case: Mapping[str, Array]) -> Array:
            given = {name: case[name] for name in recipe.reads} | dict(recipe.static)
            tx = optax.with_extra_args_support(maker(study, recipe.name)(1e-2, **given))
            moved, state = params, tx.init(params)
            for grad in case["size"] * grads:
                extra = extra_arguments(jnp.float32(1), grad, lambda p: jnp.sum(p * p), lambda p: 2 * p)
                updates, state = tx.update(grad, state, moved, **extra)
                moved = optax.apply_updates(moved, updates)
            return moved

        return jax.lax.map(one, cases)

    stacked = {name: jnp.asarray([case[name] for case in cases], jnp.float32) for name in cases[0]}
    try:
        with jax.numpy_dtype_promotion("standard"):
            return np.asarray(run(jnp.asarray(params), jnp.asarray(grads), stacked))
    except LoraxError:
        raise
    except Exception as e:  # whatever a user's own optimiser raises
        raise StudyError(f"optimizer {recipe.name!r} fails on a leaf of shape {params.shape}: {e}") from e


def evaluated(plan: Plan, recipe: Recipe, opt_state: Any, factors: Any) -> Any:
    """The factors at which a model is measured and saved: of schedule-free optimisers their average, else `factors`.

    Raises:
      StudyError: a schedule-free optimiser with lr_ratio, or of leaves that it is handed as deviations from their start
        (DoRA's).
    """
    free = optax.contrib.ScheduleFreeState
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, free)) if isinstance(s, free)]
    if states and (gains := [site for site in plan.sites if METHODS[site.setting.kind].gains]):
        raise StudyError(f"schedule-free optimisers do not average the gains of {gains[0].setting.kind}.")
    if states and recipe.ratio:
        raise StudyError(
            f"lr_ratio scales updates, and those of {recipe.name!r} are not proportional to its rate.\n"
            "  leave lr_ratio out, or choose another optimiser"
        )
    leaves, tree = jax.tree.flatten(factors, is_leaf=lambda x: x is None)
    for state in states:
        others = jax.tree.leaves(state.z, is_leaf=lambda x: x is None or isinstance(x, optax.MaskedNode))
        pairs = zip(leaves, others, strict=True)
        leaves = [
            x if isinstance(z, optax.MaskedNode | None) else ((x - (1.0 - state.b1) * z) / state.b1).astype(x.dtype)
            for x, z in pairs
        ]
    return jax.tree.unflatten(tree, leaves)
