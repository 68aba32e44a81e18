"""Trains the groups of a study one after the other, and keeps what each trial came to."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from lorax_kit.analysis.spectra import effective_rank, rank_for_energy, site_spectrum
from lorax_kit.checkpoint.adapter import BaseIdentity, adapter_bytes, identity_of, save_adapter
from lorax_kit.core.leaves import trained_only
from lorax_kit.core.lowrank import dense
from lorax_kit.core.merge import merge
from lorax_kit.core.paths import Params, flatten, nbytes
from lorax_kit.core.plan import Plan
from lorax_kit.errors import StudyError
from lorax_kit.problem import LOSS, Evaluator, Problem, val_and_test
from lorax_kit.problem.base import based, restored
from lorax_kit.study.design.study import Study
from lorax_kit.study.design.trial import Trial
from lorax_kit.study.programs.engine import Engine
from lorax_kit.study.programs.forms import Form, stream_of, trial_plan
from lorax_kit.study.programs.groups import Group
from lorax_kit.study.programs.packing import Pack, pack, start, unpack
from lorax_kit.study.programs.processes import told
from lorax_kit.study.programs.progress import Progress, Trained
from lorax_kit.study.programs.slices import Layout
from lorax_kit.study.shared_store import SharedStore
from lorax_kit.study.store import RunStore
from lorax_kit.study.trackers import Tracker
from lorax_kit.training.objective import is_key

LEADING = 64  # singular values kept of a delta that is not low-rank, such as DoRA's


def _result(row: dict[str, Any], problem: Problem) -> str:
    if row["status"] != "done":
        return str(row["status"])
    return f"test {problem.metric} {row[f'test_{problem.metric}']:{problem.chief.format}}"


def _together(*x: Any) -> Any:
    """The leaves of several batches on one axis."""
    return jnp.stack(x) if is_key(x[0]) else np.stack(x)


class Session:
    """What the groups of one run share: engines by shape, so that equal groups share a compiled program.

    Args:
      study, problem, params, store: what to train, and where results go.
      mesh: as for `lk.run`.
      progress: draw bars.
      trackers: told of what happens.
    """

    def __init__(
        self,
        study: Study,
        problem: Problem,
        params: Params,
        store: RunStore | SharedStore,
        mesh: Mesh | None,
        progress: bool,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.study, self.problem, self.params, self.store = study, problem, params, store
        self.mesh, self.progress, self.began, self.trackers = mesh, progress, perf_counter(), trackers
        self.earlier_compiles = int(store.info.get("compiles") or 0)
        self.earlier_seconds = float(store.info.get("seconds") or 0.0)
        self.engines: dict[Any, Engine] = {}
        self.bases: dict[Any, Params] = {}
        self.identities: dict[Any, BaseIdentity] = {}
        self.packed: tuple[Any, tuple[Engine, Pack]] | None = None
        self.tests: dict[Any, tuple[Evaluator, Evaluator]] = {}

    @property
    def compiles(self) -> int:
        """Compilations of the train step, over all sessions of this run folder."""
        return self.earlier_compiles + sum(engine.compiles for engine in self.engines.values())

    @property
    def seconds(self) -> float:
        """Wall time, over all sessions of this run folder."""
        return self.earlier_seconds + perf_counter() - self.began

    def base_of(self, form: Form, plan: Plan) -> Params:
        """The base of a form: cast, and quantised at the sites of the plan."""
        sites = tuple(site.path for site in plan.sites) if form.quantise else ()
        key = (form.dtype, form.quantise, sites)
        if key not in self.bases:
            self.bases[key] = based(self.params, form.dtype, form.quantise, sites)
        return self.bases[key]

    def check(self, group: Group) -> dict[str, float]:
        """Measure the untrained model on one batch of each kind: what its scores lack is to be known before training.

        Returns:
          The metrics of validation and test, which tell another `apply` or `score` from that of an earlier call.

        Raises:
          StudyError: a score out of range, a metric that cannot be computed.
        """
        base = restored(self.base_of(group.form, group.plan))
        found = [measure.check(base) for measure in self._tests(group.plan, group.form, base)]
        return {f"{part}_{k}": x for part, one in zip(("val", "test"), found, strict=True) for k, x in one.items()}

    def run_group(self, group: Group, label: str) -> None:
        """Train a group, or go on with it, and write what its trials came to."""
        names = [trial.name for trial in group.trials]
        earlier = self.store.load_progress(names, group.size)
        engine, stacked = self._engine(group)
        trained, _ = self._train(engine, stacked, group, self.study.steps, label, earlier)
        self.keep(group, trained, new=earlier is None or len(earlier.losses) < self.study.steps)
        self.store.drop_progress()

    def train_until(self, group: Group, until: int, label: str, before: Progress | None) -> Progress:
        """Train a group to a step, from where an interruption left it, or from where it was `before`."""
        found = self.store.load_progress([trial.name for trial in group.trials], group.size)
        engine, stacked = self._engine(group)
        return self._train(engine, stacked, group, until, label, before if found is None else found)[1]

    def finished(self, group: Group, progress: Progress) -> Trained:
        """What a group came to whose trials were trained before, in other groups perhaps."""
        engine, stacked = self._engine(group)
        return engine.finished(stacked, progress)

    def keep(self, group: Group, trained: Trained, *, new: bool) -> None:
        """Write what the trials of a group came to; `new`: the group's own facts, too."""
        self._keep_curves(group, trained)
        if new:
            self._keep_facts(group, trained)
        self._keep_trials(group, trained)

    def keep_stopped(self, group: Group, trial: Trial, slot: Progress) -> None:
        """Write the row of a trial that a rule stopped, or that diverged before."""
        if trial.name in self.store.finished:
            return
        alone = group._replace(trials=[trial], layout=Layout(1, 1))
        trained = Trained(None, slot.losses, slot.failed, slot.evaluations, slot.seconds, 0.0, 0)
        self._keep_curves(alone, trained)
        base = self.base_of(group.form, group.plan)
        plan = trial_plan(self.study, self.problem, group.plan, trial, base)
        shapes = jax.eval_shape(lambda: start(self.problem, plan, trial.seed, base)[1])
        row = self._row(group, trial, jax.tree.leaves(trained_only(plan, shapes)), trained, 0)
        if row["status"] == "done":
            steps = len(slot.losses)
            last = slot.losses[-max(self.study.steps // 10, 1) :, 0]
            row |= {"status": "stopped", "stopped_at": steps, "steps": steps, "train_loss": float(last.mean())}
            row |= self._columns("val", slot.evaluations[-1][1][0])
        self._finish(row)

    def _engine(self, group: Group) -> tuple[Engine, Pack]:
        """The compiled program of a group, and where its trials start."""
        names = [trial.name for trial in group.trials]
        if self.packed is not None and self.packed[0] == (names, group.layout):
            return self.packed[1]
        base = self.base_of(group.form, group.plan)
        stacked = pack(self.study, self.problem, group.trials, group.plan, base, group.form, group.size)
        key = (group.plan, group.layout, group.form)
        if key not in self.engines:
            self.engines[key] = Engine(
                self.study, self.problem, group.plan, base, group.layout, self.mesh, form=group.form
            )
        self.packed = ((names, group.layout), (self.engines[key], stacked))
        return self.packed[1]

    def _batches(self, form: Form, start: int) -> Iterator[Any]:
        streams = [stream_of(self.study, self.problem, form, seed, start) for seed in self.study.streams]
        if self.study.stream == "shared":
            return streams[0]
        return (jax.tree.map(_together, *together) for together in zip(*streams, strict=False))

    def _train(
        self, engine: Engine, stacked: Pack, group: Group, until: int, label: str, earlier: Progress | None
    ) -> tuple[Trained, Progress]:
        done, count = 0 if earlier is None else len(earlier.losses), len(group.trials)
        bar = tqdm(total=until, initial=done, desc=label, unit="step", disable=None if self.progress else True)
        shown: dict[str, str] = {}
        names = [trial.name for trial in group.trials]

        def on_step(number: int, losses: np.ndarray, failed: np.ndarray) -> None:
            own = losses[:count][failed[:count] == 0]
            shown["loss"] = f"{own.mean():.4f}" if len(own) else "nan"
            for i in np.flatnonzero(failed[:count] == number):
                name = stacked.trials[i].name
                tqdm.write(
                    f"{name}: loss is not finite at step {number}; this trial stops, the others go on", file=sys.stderr
                )
            bar.update()
            bar.set_postfix(shown)
            if self.trackers:
                alive = [i for i in range(count) if failed[i] in (0, number)]
                self._tell("step", step=number, losses={names[i]: float(losses[i]) for i in alive})

        def on_eval(number: int, metrics: list[dict[str, float]]) -> None:
            for metric in {"loss": LOSS, self.problem.metric: self.problem.chief}.values():
                mean = np.mean([m[metric.name] for m in metrics[:count]])
                shown[f"val_{metric.name}"] = format(mean, metric.format)
            bar.set_postfix(shown)
            self._tell("validation", step=number, metrics=dict(zip(names, metrics[:count], strict=True)))

        def on_save(progress: Progress) -> None:
            self.store.save_progress(names, progress)
            self.store.write_info(compiles=self.compiles, seconds=self.seconds)

        with bar:
            if engine.compiles == 0 and done < until:
                bar.set_postfix_str("compiling the step")
            return engine.train(
                stacked,
                partial(self._batches, group.form),
                self.problem.val,
                progress=earlier,
                until=until if until < self.study.steps else None,
                on_step=on_step,
                on_eval=on_eval,
                on_save=on_save,
            )

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
        """What the group's program needed."""
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
        self.store.write_info(
            compiles=self.compiles,
            groups=[*self.store.info.get("groups", []), described],
            seconds=self.seconds,
        )

    def _keep_trials(self, group: Group, trained: Trained) -> None:
        """Each trial: merged and tested alone, saved, its row written."""
        bar = tqdm(
            range(len(group.trials)), desc="testing, saving", unit="trial", disable=None if self.progress else True
        )
        for i in bar:
            if group.trials[i].name in self.store.finished:
                continue
            row = told(partial(self._trial_row, group, trained, i), StudyError)
            bar.set_postfix_str(f"{row['trial']}: {_result(row, self.problem)}")
            self._finish(row)
            self.store.write_info(seconds=self.seconds)

    def _finish(self, row: dict[str, Any]) -> None:
        self.store.finish_trial(row)
        self._tell("trial", row=row)

    def _tell(self, event: str, **facts: Any) -> None:
        for tracker in self.trackers:
            tracker({"event": event, **facts})

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
            "compiles": self.compiles,
            "status": "diverged" if failed else "done",
            "failed_step": failed,
            "stopped_at": None,
            "adapter": None,
        }

    def _trial_row(self, group: Group, trained: Trained, i: int) -> dict[str, Any]:
        trial, study, problem = group.trials[i], self.study, self.problem
        base = self.base_of(group.form, group.plan)
        plan = trial_plan(study, problem, group.plan, trial, base)
        failed = bool(trained.failed[i])
        factors = unpack(plan, trained.factors, i, diverged=failed)
        row = self._row(group, trial, jax.tree_util.tree_leaves(trained_only(plan, factors)), trained, i)
        if failed:
            return row
        merged = merge(base, factors, plan)
        val, test = (measure(merged) for measure in self._tests(plan, group.form, merged))
        path = self.store.adapter_path(trial.name)
        save_adapter(
            path,
            plan,
            factors,
            base=base,
            identity=self._identity(group.form, plan, base),
            # As JSON has it: facts may hold tuples.
            meta={
                "problem": problem.name,
                "settings": json.loads(json.dumps(problem.facts.get("settings"))),
                "trial": trial.name,
                **({"address": problem.address} if problem.address else {}),
                **self._condition(group),
            },
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

    def _columns(self, part: str, found: Mapping[str, float] | None = None) -> dict[str, float | None]:
        """The columns of a part's metrics; empty where none were measured."""
        names = [metric.name for metric in self.problem.all_metrics]
        return {f"{part}_{name}": None if found is None else found[name] for name in names}

    def _identity(self, form: Form, plan: Plan, base: Params) -> BaseIdentity:
        """Of a base, hashed once for all its adapters."""
        key = (form.dtype, form.quantise, tuple(leaf.path for leaf in plan.full), id(base))
        if key not in self.identities:
            self.identities[key] = identity_of(base, plan)
        return self.identities[key]

    def _condition(self, group: Group) -> dict[str, Any]:
        """What `lorax-kit evaluate` needs to make the same base, where it is not as the problem gives it."""
        form, sites = group.form, [site.path for site in group.plan.sites]
        if form.dtype is None and form.quantise is None:
            return {}
        return {"base_form": {"dtype": form.dtype, "quantise": form.quantise, "paths": sites if form.quantise else []}}

    def _tests(self, plan: Plan, form: Form, params: Params) -> tuple[Evaluator, Evaluator]:
        """Validation and test of merged params; trials of one target set and base share them."""
        key = (plan.trained, form.dtype, form.quantise)
        if key not in self.tests:
            self.tests[key] = val_and_test(self.problem, params, plan.trained)
        return self.tests[key]

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
