"""`train`: one adapter on any problem, by `lk.fit`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from tqdm import tqdm

from lorax_kit.checkpoint.adapter import adapter_bytes, read_document, save_adapter
from lorax_kit.checkpoint.fingerprint import fingerprint
from lorax_kit.commands.adapters.memory import within
from lorax_kit.core.leaves import trained_only
from lorax_kit.core.merge import split
from lorax_kit.core.paths import Params, flatten
from lorax_kit.core.plan import Plan
from lorax_kit.core.specs.setting import is_int
from lorax_kit.core.specs.spec import AnySetting, Spec
from lorax_kit.errors import AdapterError, StudyError
from lorax_kit.files.staging import clear_stale, sole_writer
from lorax_kit.files.writing import writing
from lorax_kit.measure import peak_memory, release_memory
from lorax_kit.problem import Problem, val_and_test, version
from lorax_kit.problem.objective import STATE, draws, loss_scale, training_loss, with_state
from lorax_kit.problems.settings import Settings
from lorax_kit.report.measure import Measure
from lorax_kit.report.pages.training import Training, data_text, write_training_report
from lorax_kit.training import Fitted, Info, State, fit, make_step, partition
from lorax_kit.transform import all_linear, resolve

SAVED = "training.npz"
DATA_FACTS = ("rows", "train", "val", "test", "left_out", "length", "cut")


def train_adapter(
    problem: Problem | Settings,
    setting: AnySetting,
    *,
    out: Path,
    lr: float,
    seed: int,
    targets: Sequence[str] = (),
    epochs: int,
    steps_per_epoch: int | None,
    save_memory: bool = False,
    max_memory: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train one adapter by `lk.fit` and save it under `out`; the epoch that is best by the problem's metric is kept,
    of equal ones that of the lower validation loss, then the earlier.

    Interrupted, the same call goes on, to the same bits: `out/training.npz` holds the training until its page is
    saved. Each epoch is once in `out/metrics.jsonl`.

    Args:
      problem: what to train on.
      setting: of the method.
      targets: patterns, or "all-linear" alone; none: the problem's own, and "all-linear" where it has none.
      steps_per_epoch: None: the problem's fact of that name.
      save_memory: form everything again in the backward pass, as `lk.adapt(recompute="everything")` does.
      max_memory: bytes that training may take; see `lorax_kit.commands.adapters.memory.within`. None: any number.

    Returns:
      {"adapter", "report" (a page, see `write_training_report`), "data" (rows, parts, what was left out or cut),
      "stopped", "history", "test_<metric>"..., "peak_memory_bytes"}, the last of the whole process, None where the
      system does not tell.

    Raises:
      StudyError: a rate that is not positive, no number of steps, a training that gave nothing, another process that
        trains in `out`.
      AdapterError: `out` holds an adapter.
      LoraxError: `out` holds an interrupted training of other settings; more memory than `max_memory`.
    """
    _check(out, lr)
    problem = problem if isinstance(problem, Problem) else problem.build()
    per_epoch = _steps_per_epoch(problem, steps_per_epoch)
    example = next(iter(problem.train(seed, 0)))
    adapted = _adapt(problem, setting, targets, example, seed)
    plan, base = adapted.plan, adapted.base
    tx = partition(optax.adamw(optax.linear_schedule(lr, 0.0, per_epoch * epochs)), plan, clip=1.0)
    init, step = _steps(problem, adapted, tx, "everything" if save_memory else True)
    validate, test = val_and_test(problem, *version(base, adapted.factors, plan))

    def release() -> None:
        if max_memory is not None:  # it looks at every object: seconds in a process that holds many
            release_memory()

    def measure(factors: Any) -> dict[str, float]:
        release()
        metrics = _metrics(problem, validate(version(base, factors, plan)[0]))
        release()
        return metrics

    # Where nothing is random no key is drawn for a step.
    state = init(adapted.factors, jax.random.fold_in(jax.random.key(seed), 2) if draws(problem, plan) else None)
    if max_memory is not None:
        step = within(step, max_memory, state, base, example)
    if progress:
        tqdm.write(data_text(problem.facts), file=sys.stderr)
    with writing(out, StudyError):
        out.mkdir(parents=True, exist_ok=True)
    with sole_writer(out, StudyError):
        clear_stale(out)
        saved, log = _begun(out)
        run: dict[str, Any] = {"lr": lr, "seed": seed, "steps per epoch": per_epoch}
        settings = {
            "problem": problem.facts.get("settings") or {},
            "base": fingerprint(base, [leaf.path for leaf in plan.full]),
            "spec": adapted.spec.to_dict(),
            **run,
        }
        rounds = [Epoch(problem, seed, per_epoch, number) for number in range(epochs)]
        release()
        fitted = fit(
            step, state, base, rounds, evaluate=measure, monitor=f"val_{problem.metric}", better=problem.chief.better,
            log=log, progress=progress, saved=saved, settings=settings,
        )  # fmt: skip
        if not fitted.history:
            saved.unlink(missing_ok=True)
            raise StudyError(f"training gave no usable adapter: {fitted.stopped}.\n  lower the learning rate")
        tested = test(version(base, fitted.state.factors, plan)[0])
        # The page comes last but one: a training that is killed before goes on here, to the same bits.
        save_adapter(out / "adapter", plan, fitted.state.factors, base=base, meta=problem.remembered, overwrite=True)
        run |= {"epochs": epochs, "save memory": save_memory, "base": settings["base"]}
        told = _told(problem, adapted, fitted, tested, run, out / "adapter")
        page = write_training_report(out, told)
        saved.unlink(missing_ok=True)
        return _result(problem, told, out / "adapter", page)


class Adapted(NamedTuple):
    """A problem's model before its first step.

    Attributes:
      parameters: how many the whole model has.
    """

    spec: Spec
    plan: Plan
    base: Params
    factors: Params
    parameters: int


def _check(out: Path, lr: float) -> None:
    """Raise where a training cannot begin."""
    if not 0 < lr < float("inf"):
        raise StudyError(f"lr is {lr}; it must be a positive number.")
    if (out / "adapter").exists() and not (out / SAVED).exists():
        raise AdapterError(
            f"{str(out / 'adapter')!r} exists: that training is finished.\n  choose another folder, or delete this one"
        )


def _result(problem: Problem, told: Training, adapter: Path, report: Path) -> dict[str, Any]:
    """What `train_adapter` returns."""
    return {
        "adapter": str(adapter),
        "report": str(report),
        "data": {name: problem.facts[name] for name in DATA_FACTS if name in problem.facts},
        "stopped": told.stopped,
        "history": told.history,
        **{f"test_{name}": value for name, value in told.test.items()},
        "peak_memory_bytes": peak_memory(),
    }


def _steps_per_epoch(problem: Problem, asked: int | None) -> int:
    per_epoch: Any = asked or problem.facts.get("steps_per_epoch")
    if not is_int(per_epoch) or per_epoch < 1:
        raise StudyError(
            f"problem {problem.name!r} does not say how many steps an epoch has.\n"
            "  say so: steps_per_epoch=N, or Problem(facts={'steps_per_epoch': N})"
        )
    return int(per_epoch)


def _adapt(problem: Problem, setting: AnySetting, targets: Sequence[str], example: Any, seed: int) -> Adapted:
    params = problem.params(jax.random.fold_in(jax.random.key(seed), 0))
    targets = tuple(targets) or problem.targets or ("all-linear",)
    rules = [(p, setting) for p in targets]
    if targets == ("all-linear",):
        own = (*problem.head, *problem.state)
        rules = list(all_linear(setting, params, problem.apply, example, exclude=own).rules)  # type: ignore[arg-type]
    spec = Spec([*problem.whole_rules, *rules])
    plan = resolve(spec, params, problem.apply, example)
    base, factors = split(params, plan, jax.random.fold_in(jax.random.key(seed), 1))
    return Adapted(spec, plan, base, factors, sum(prod(x.shape) for x in flatten(params)[0].values()))


def _begun(out: Path) -> tuple[Path, Path]:
    """The files that hold a training under way and its epochs; of an earlier one without an adapter nothing is left."""
    saved, log = out / SAVED, out / "metrics.jsonl"
    if saved.exists():
        tqdm.write(f"{str(out)!r} holds an interrupted training: going on", file=sys.stderr)
    elif log.exists():
        tqdm.write(f"{str(log)!r} is of an earlier training without an adapter: beginning anew", file=sys.stderr)
        log.unlink()
    return saved, log


def _told(
    problem: Problem, adapted: Adapted, fitted: Fitted, tested: dict[str, float], run: dict[str, Any], adapter: Path
) -> Training:
    """What the page of a training shows."""
    return Training(
        name=str(problem.facts.get("name") or problem.name),
        measures=[Measure(**one.to_dict()) for one in dict.fromkeys((problem.chief, *problem.all_metrics))],
        history=fitted.history,
        test=_metrics(problem, tested),
        examples=int(problem.facts.get("test", tested["examples"])),
        best=fitted.best if fitted.best is not None else len(fitted.history) - 1,
        stopped=fitted.stopped,
        data=problem.facts,
        spec=adapted.spec.to_dict(),
        run={
            "optimiser": "AdamW, its rate falling linearly to 0, gradients clipped at 1",
            **run,
            "versions": read_document(adapter, typed=False)["versions"],
        },
        trained=sum(x.size for x in jax.tree.leaves(trained_only(adapted.plan, fitted.state.factors))),
        parameters=adapted.parameters,
        adapter_bytes=adapter_bytes(adapter),
    )


@dataclass(frozen=True)
class Epoch:
    """The batches of one epoch, made as they are asked for.

    Args:
      steps: of each epoch.
      number: which epoch, from 0.
    """

    problem: Problem
    seed: int
    steps: int
    number: int

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.problem.train(self.seed, self.number * self.steps), self.steps)

    def __len__(self) -> int:
        return self.steps


def _metrics(problem: Problem, measured: dict[str, float]) -> dict[str, float]:
    return {metric.name: measured[metric.name] for metric in problem.all_metrics}


def _steps(
    problem: Problem, adapted: Adapted, tx: optax.GradientTransformation, recompute: bool | str
) -> tuple[Callable[..., State], Any]:
    """`init` and the compiled step of a problem's training; the aux holds its metrics over the batch."""
    loss = training_loss(problem, adapted.plan, measured=True, recompute=recompute)
    init, plain = make_step(loss, tx, loss_scale=loss_scale(adapted.base, adapted.plan), jit=False)

    def step(state: State, base: Params, batch: Any) -> tuple[State, Info]:
        state, info = plain(state, base, batch)
        aux = {name: x for name, x in info.aux.items() if name != STATE}
        return with_state(state, info), info._replace(aux=aux)

    return init, jax.jit(step, donate_argnums=(0,))
