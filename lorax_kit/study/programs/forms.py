"""What shares a compiled program: the form of a trial, the stacks of trials that are alike, and their plans."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lorax_kit.core.method import METHODS, frozen_leaves, leaf_shapes
from lorax_kit.core.paths import Params
from lorax_kit.core.plan import Plan, match
from lorax_kit.core.specs.setting import Full, Setting
from lorax_kit.core.specs.spec import Spec
from lorax_kit.errors import StudyError
from lorax_kit.problem import Problem
from lorax_kit.study.design.study import Study
from lorax_kit.study.design.trial import Trial
from lorax_kit.study.programs.optimiser import Recipe, keywords_of, recipe_of, rows_treatment
from lorax_kit.transform.resolve import resolve


class Form(NamedTuple):
    """What a program is compiled for, beside the plan: trials of one form may share a stack.

    Attributes:
      recipe: of the optimiser.
      dtype, quantise: of the base.
      batch_size: of the training batches.
      accumulate: micro-batches per step.
      held: whether a mask holds rows of zeros at zero, where the optimiser would move them.
    """

    recipe: Recipe = Recipe()
    dtype: str | None = None
    quantise: str | None = None
    batch_size: int | None = None
    accumulate: int = 1
    held: bool = False


class Stack(NamedTuple):
    """Trials that one program may train.

    Attributes:
      trials: of one form.
      plan: of all their sites, at the highest rank.
      form: what the program is compiled for.
    """

    trials: list[Trial]
    plan: Plan
    form: Form


DEFAULT = Form()


def form_of(study: Study, problem: Problem, trial: Trial) -> Form:
    """The form of a trial.

    Raises:
      StudyError: an optimiser that does not exist, a scalar or a batch size that nothing reads.
    """
    if trial.batch_size is not None and "batch_size" not in keywords_of(problem.train):
        raise StudyError(
            f"study batch_size is {trial.batch_size}, and train of problem {problem.name!r} takes none.\n"
            "  give it a keyword: train(seed, start, *, batch_size=...)"
        )
    recipe = recipe_of(study, trial, frozenset(keywords_of(problem.loss, skip=2)))
    return Form(recipe, trial.dtype, trial.quantise, trial.batch_size, trial.accumulate)


def kinds(study: Study, problem: Problem, trials: Sequence[Trial]) -> list[tuple[list[Trial], Form]]:
    """Trials that may share a stack: of one form and one method, and one target set where more than rows train or the
    base is quantised.

    The probe joins the first kind of its form: it is a trial of rank 0.
    """
    grouped: dict[tuple[Any, ...], list[Trial]] = {}
    forms: dict[Any, Form] = {}
    for trial in trials:
        key: tuple[Any, ...] = (trial.optimizer, trial.hyper, trial.weight_decay)
        key = (*key, trial.dtype, trial.quantise, trial.batch_size, trial.accumulate)
        if key not in forms:
            forms[key] = form_of(study, problem, trial)
        form = forms[key]
        if trial.rank > 0:
            # A base is quantised at the sites of its program: those of another target set would change a trial's base.
            across = None if _rows_only(study.setting(trial)) and trial.quantise is None else trial.targets
            own = (form, trial.variant, trial.settings, trial.start, trial.dropout > 0, across)
            grouped.setdefault(own, []).append(trial)
    for trial in trials:
        if trial.rank == 0:
            form = form_of(study, problem, trial)
            joined = next((key for key in grouped if key[0] == form and key[-1] is None), (form, "probe"))
            grouped.setdefault(joined, []).append(trial)
    out = []
    for (form, *_), some in grouped.items():
        ratio = any(trial.lr_ratio != 1 for trial in some)
        out.append((some, form._replace(recipe=form.recipe._replace(ratio=ratio))))
    return out


def stacks(
    study: Study, problem: Problem, trials: Sequence[Trial], form: Form, params: Params, batch: Any
) -> list[Stack]:
    """The stacks of one kind of trials, each with its `union_plan`.

    Those whose leaves differ in rows only share one: at another rank a method may hold other leaves, such as a dense
    matrix for factors. Where the optimiser mixes rows, those of one rank share one. The probe joins the first.
    """
    plan = union_plan(study, problem, trials, params, batch)
    apart: dict[Any, list[Trial]] = {}
    for trial in sorted(trials, key=lambda trial: trial.rank == 0):
        own = _leaves(study, plan, trial) if trial.rank > 0 else next(iter(apart), None)
        apart.setdefault(own, []).append(trial)
    out = []
    for alike in apart.values():
        whole = plan if len(apart) == 1 else union_plan(study, problem, alike, params, batch)
        ranks = [trial.rank for trial in alike if trial.rank > 0]
        rows = "kept"
        if len(set(ranks)) > 1:
            rows = rows_treatment(study, whole, [trial for trial in alike if trial.rank > 0], form.recipe)
        if rows != "mixed":
            own_order = [trial for trial in trials if trial in alike]
            out.append(Stack(own_order, whole, form._replace(held=rows == "held")))
            continue
        by_rank: dict[int, list[Trial]] = {}
        for trial in alike:
            by_rank.setdefault(trial.rank or ranks[0], []).append(trial)
        out += [Stack(same, union_plan(study, problem, same, params, batch), form) for same in by_rank.values()]
    return out


def _leaves(study: Study, plan: Plan, trial: Trial) -> Any:
    """Which leaves a trial has at the sites of a plan, and the shapes of those that no zero rows extend."""
    setting = study.setting(trial)
    rows = METHODS[setting.kind].rows
    by_site = []
    for site in plan.sites:
        leaves = leaf_shapes(replace(site, setting=setting))._asdict()
        by_site.append(tuple(None if x is None else name in rows or (x.shape, x.dtype) for name, x in leaves.items()))
    return tuple(by_site)


def _rows_only(setting: Setting) -> bool:
    """Whether a site whose rows are all zero is one that is not adapted."""
    method = METHODS[setting.kind]
    return set(method.leaves._fields) <= method.rows | frozen_leaves(setting)


def stream_of(study: Study, problem: Problem, form: Form, seed: int, start: int) -> Iterator[Any]:
    """The training batches of a form from step `start`."""
    size = {} if form.batch_size is None else {"batch_size": form.batch_size}
    return iter(problem.train(seed, start, **size))


class Examples:
    """The first training batch of each form, read once: an example of its shapes."""

    def __init__(self, study: Study, problem: Problem) -> None:
        self.study, self.problem = study, problem
        self._read: dict[int | None, Any] = {}

    def __call__(self, form: Form) -> Any:
        """The first batch of a form."""
        if form.batch_size not in self._read:
            stream = stream_of(self.study, self.problem, form, self.study.streams[0], 0)
            self._read[form.batch_size] = next(stream)
        return self._read[form.batch_size]


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
    """Cut the plan of one trial out of the plan of all."""
    spec = study.spec(trial, problem.whole_rules)
    settings = match(spec, params)
    chosen = ((site, settings.get(site.path)) for site in plan.sites)
    sites = tuple(replace(site, setting=s) for site, s in chosen if isinstance(s, Setting))
    return replace(plan, sites=sites, spec=spec)
