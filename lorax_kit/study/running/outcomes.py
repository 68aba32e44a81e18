"""What trials came to: curves, facts of their groups, adapters, spectra, rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from tqdm import tqdm

from lorax_kit.analysis.spectra import effective_rank, rank_for_energy, site_spectrum
from lorax_kit.checkpoint.adapter import BaseIdentity, adapter_bytes, identity_of, save_adapter
from lorax_kit.checkpoint.agreed import told
from lorax_kit.core.leaves import trained_only
from lorax_kit.core.lowrank import dense
from lorax_kit.core.merge import merge
from lorax_kit.core.paths import Params, flatten, nbytes
from lorax_kit.core.plan import Plan
from lorax_kit.errors import StudyError
from lorax_kit.problem import Evaluator, Problem, val_and_test
from lorax_kit.problem.base import based, restored
from lorax_kit.study.design.study import Study
from lorax_kit.study.design.trial import Trial
from lorax_kit.study.folder.parcel import Parcel, write_folder
from lorax_kit.study.folder.shared import SharedStore
from lorax_kit.study.folder.store import RunStore
from lorax_kit.study.programs.forms import Form, trial_plan
from lorax_kit.study.programs.groups import Group
from lorax_kit.study.programs.packing import start, unpack
from lorax_kit.study.programs.progress import Progress, Trained
from lorax_kit.study.programs.slices import Layout

LEADING = 64  # singular values kept of a delta that is not low-rank, such as DoRA's


class Bases:
    """The frozen bases of a study: as the problem gives it, cast, or quantised."""

    def __init__(self, params: Params) -> None:
        self._params = params
        self._made: dict[Any, Params] = {}

    def __call__(self, form: Form, plan: Plan) -> Params:
        """The base of a form: cast, and quantised at the sites of the plan."""
        sites = tuple(site.path for site in plan.sites) if form.quantise else ()
        key = (form.dtype, form.quantise, sites)
        if key not in self._made:
            self._made[key] = based(self._params, form.dtype, form.quantise, sites)
        return self._made[key]


class Outcomes:
    """Measures trained trials and writes what they came to.

    Args:
      study, problem: what was trained.
      bases: of its forms.
      store: where results go.
      spent: () -> (compilations, seconds) of the run folder so far.
      tell: (event, **facts), told of finished trials.
      progress: draw bars.
    """

    def __init__(
        self,
        study: Study,
        problem: Problem,
        bases: Bases,
        store: RunStore | SharedStore,
        spent: Callable[[], tuple[int, float]],
        tell: Callable[..., None],
        progress: bool,
    ) -> None:
        self.study, self.problem, self.bases, self.store = study, problem, bases, store
        self._spent, self._tell, self._progress = spent, tell, progress
        self._identities: dict[Any, BaseIdentity] = {}
        self._evaluators: dict[Any, tuple[Evaluator, Evaluator]] = {}

    def check(self, group: Group) -> dict[str, float]:
        """Measure the untrained model on one batch of each kind: what its scores lack is to be known before training.

        Returns:
          The metrics of validation and test, which tell another `apply` or `score` from that of an earlier call.

        Raises:
          StudyError: a score out of range, a metric that cannot be computed.
        """
        base = restored(self.bases(group.form, group.plan))
        metrics = [measure.check(base) for measure in self._tests(group.plan, group.form, base)]
        return {f"{part}_{k}": x for part, one in zip(("val", "test"), metrics, strict=True) for k, x in one.items()}

    def keep(self, group: Group, trained: Trained, *, new: bool) -> None:
        """Write what the trials of a group came to; `new`: the group's own facts, too."""
        self._keep_curves(group, trained)
        if new:
            self._keep_facts(group, trained)
        self._keep_trials(group, trained)

    def take(self, parcel: Parcel) -> None:
        """Write what trials came to on a worker."""
        if parcel.facts is not None:
            self._keep_group(parcel.facts)
        for row in parcel.rows:
            trial = row["trial"]
            if trial in self.store.finished:
                continue
            curves, spectra = ([x for x in rows if x["trial"] == trial] for rows in (parcel.curves, parcel.spectra))
            if self.store.curves[trial] < len(curves):
                self.store.append("curves.jsonl", curves)
            if trial in parcel.adapters:
                write_folder(self.store.adapter_path(trial), parcel.adapters[trial])
                self.store.append("spectra.jsonl", spectra)
            self._finish(row)

    def keep_stopped(self, group: Group, trial: Trial, slot: Progress) -> None:
        """Write the row of a trial that a rule stopped, or that diverged before."""
        if trial.name in self.store.finished:
            return
        alone = group._replace(trials=[trial], layout=Layout(1, 1))
        trained = Trained(None, slot.losses, slot.failed, slot.evaluations, slot.seconds, 0.0, 0)
        self._keep_curves(alone, trained)
        base = self.bases(group.form, group.plan)
        plan = trial_plan(self.study, self.problem, group.plan, trial, base)
        shapes = jax.eval_shape(lambda: start(self.problem, plan, trial.seed, base)[1])
        row = self._row(alone, trial, jax.tree.leaves(trained_only(plan, shapes)), trained, 0)
        if row["status"] == "done":
            steps = len(slot.losses)
            last = slot.losses[-max(self.study.steps // 10, 1) :, 0]
            row |= {"status": "stopped", "stopped_at": steps, "steps": steps, "train_loss": float(last.mean())}
            row |= self._columns("val", slot.evaluations[-1][1][0])
        self._finish(row)

    def _keep_curves(self, group: Group, trained: Trained) -> None:
        """Losses by step, and validations along the way."""
        every = dict(trained.evaluations)
        for i, trial in enumerate(group.trials):
            rows = []
            for step, loss in enumerate(trained.losses[:, i], 1):
                row: dict[str, Any] = {"trial": trial.name, "step": step, "loss": float(loss)}
                if step in every:
                    row |= self._columns("val", every[step][i])
                rows.append(row)
                if trained.failed[i] == step:
                    break
            if self.store.curves[trial.name] < len(rows):
                self.store.append("curves.jsonl", rows)

    def _keep_facts(self, group: Group, trained: Trained) -> None:
        """Record the memory, collectives and time that the group's program took."""
        described = {
            "trials": len(group.trials),
            "names": [trial.name for trial in group.trials],
            "size": group.size,
            "at_once": group.layout.at_once,
            "estimated_bytes": group.estimated_bytes,
            "temp_bytes": trained.temp_bytes,
            "collective_bytes": trained.collective_bytes,
            "seconds": trained.seconds,
            "compile_seconds": trained.compile_seconds,
        }
        self._keep_group(described)

    def _keep_group(self, facts: dict[str, Any]) -> None:
        compiles, seconds = self._spent()
        self.store.write_info(compiles=compiles, groups=[*self.store.info.get("groups", []), facts], seconds=seconds)

    def _keep_trials(self, group: Group, trained: Trained) -> None:
        """Each trial: merged and tested alone, saved, its row written."""
        bar = tqdm(
            range(len(group.trials)), desc="testing, saving", unit="trial", disable=None if self._progress else True
        )
        for i in bar:
            if group.trials[i].name in self.store.finished:
                continue
            row = told(partial(self._trial_row, group, trained, i), StudyError)
            bar.set_postfix_str(f"{row['trial']}: {_result(row, self.problem)}")
            self._finish(row)
            self.store.write_info(seconds=self._spent()[1])

    def _finish(self, row: dict[str, Any]) -> None:
        self.store.finish_trial(row)
        self._tell("trial", row=row)

    def _row(self, group: Group, trial: Trial, leaves: list[Any], trained: Trained, i: int) -> dict[str, Any]:
        """A trial's settings, size and cost; its metrics are empty."""
        failed = int(trained.failed[i]) or None
        return {
            "trial": trial.name,
            **trial.columns(),
            "params": sum(x.size for x in leaves),
            "factor_bytes": sum(nbytes(x.shape, x.dtype) for x in leaves),
            "adapter_bytes": None,
            "steps": failed or self.study.steps,
            "train_loss": None,
            **self._columns("val"),
            **self._columns("test"),
            "train_seconds": trained.seconds / len(group.trials),
            "compiles": self._spent()[0],
            "status": "diverged" if failed else "done",
            "failed_step": failed,
            "stopped_at": None,
            "adapter": None,
        }

    def _trial_row(self, group: Group, trained: Trained, i: int) -> dict[str, Any]:
        trial, study, problem = group.trials[i], self.study, self.problem
        base = self.bases(group.form, group.plan)
        plan = trial_plan(study, problem, group.plan, trial, base)
        failed = bool(trained.failed[i])
        factors = unpack(plan, trained.factors, i, diverged=failed)
        row = self._row(group, trial, jax.tree_util.tree_leaves(trained_only(plan, factors)), trained, i)
        if failed:
            return row
        merged = merge(base, factors, plan)
        val, test = (measure(merged) for measure in self._tests(plan, group.form, merged))
        if not all(math.isfinite(found[problem.metric]) for found in (val, test)):
            warnings.warn(f"{problem.metric!r} of trial {trial.name} is not finite: it enters no choice.", stacklevel=2)
        path = self.store.adapter_path(trial.name)
        save_adapter(
            path,
            plan,
            factors,
            base=base,
            identity=self._identity(group.form, plan, base),
            meta={**problem.remembered, "trial": trial.name, **self._condition(group)},
            overwrite=True,
        )
        last = trained.losses[-max(study.steps // 10, 1) :, i]
        self._spectra(plan, base, factors, trial)
        return row | {
            "adapter_bytes": adapter_bytes(path),
            "train_loss": float(last.mean()),
            **self._columns("val", val),
            **self._columns("test", test),
            "adapter": f"adapters/{trial.name}",
        }

    def _columns(self, part: str, metrics: Mapping[str, float] | None = None) -> dict[str, float | None]:
        """The columns of a part's metrics; empty where none were measured."""
        names = [metric.name for metric in self.problem.all_metrics]
        return {f"{part}_{name}": None if metrics is None else metrics[name] for name in names}

    def _identity(self, form: Form, plan: Plan, base: Params) -> BaseIdentity:
        """Of a base, hashed once for all its adapters."""
        key = (form.dtype, form.quantise, tuple(leaf.path for leaf in plan.full), id(base))
        if key not in self._identities:
            self._identities[key] = identity_of(base, plan)
        return self._identities[key]

    def _condition(self, group: Group) -> dict[str, Any]:
        """What `lorax-kit evaluate` needs to make the same base, where it is not as the problem gives it."""
        form, sites = group.form, [site.path for site in group.plan.sites]
        if form.dtype is None and form.quantise is None:
            return {}
        return {"base_form": {"dtype": form.dtype, "quantise": form.quantise, "paths": sites if form.quantise else []}}

    def _tests(self, plan: Plan, form: Form, params: Params) -> tuple[Evaluator, Evaluator]:
        """Validation and test of merged params; trials of one target set and base share them."""
        key = (plan.trained, form.dtype, form.quantise)
        if key not in self._evaluators:
            self._evaluators[key] = val_and_test(self.problem, params, plan.trained)
        return self._evaluators[key]

    def _spectra(self, plan: Plan, base: Params, factors: Any, trial: Trial) -> None:
        rows = []
        named = flatten(base)[0]
        for site in plan.sites:
            s = site_spectrum(site, dense(named[site.path]), factors[site.path])
            mean = s.reshape(-1, s.shape[-1]).mean(axis=0)
            rows.append(
                {
                    "trial": trial.name,
                    "site": site.path,
                    "rank": trial.rank,
                    "singular_values": [float(x) for x in mean[:LEADING]],
                    "effective_rank": float(effective_rank(mean)),
                    "rank90": int(rank_for_energy(mean, 0.9)),
                }
            )
        self.store.append("spectra.jsonl", rows)


def _result(row: dict[str, Any], problem: Problem) -> str:
    if row["status"] != "done":
        return str(row["status"])
    return f"test {problem.metric} {row[f'test_{problem.metric}']:{problem.chief.format}}"
