"""Sequential search by optuna's samplers: rounds of trials that are asked for, trained as one study, and told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorax_kit.core.specs.setting import is_int, shown
from lorax_kit.errors import StudyError
from lorax_kit.extras import need
from lorax_kit.problem import Problem
from lorax_kit.study.design.sampling import WHOLE, Sample
from lorax_kit.study.design.study import Study
from lorax_kit.study.run import Results, run


def search(
    study: Study,
    problem: Problem,
    ranges: Mapping[str, Any],
    *,
    out: str | Path,
    rounds: int,
    conditions: int = 8,
    sampler: Any = None,
    **options: Any,
) -> Results:
    """Let optuna choose the settings of each round from the results of those before.

    A round's conditions train together, as one stacked program; each is told as the mean over the study's seeds of the
    problem's metric on the validation set. The run folder grows by a round at a time. The same call goes on where an
    earlier one stopped: a sampler with a seed asks the same again, and finished trials are not trained anew.

    Args:
      study: what the ranges do not say, the seeds above all.
      ranges: axis -> range, as `lk.Sample` takes them.
      out: the run folder.
      rounds, conditions: how many rounds, and conditions in each.
      sampler: an optuna sampler; None: `TPESampler(seed=0)`.
      options: further keywords of `lk.run`.

    Returns:
      The results of all rounds.

    Raises:
      StudyError: optuna is not installed, a range that is none, a study with grids or a sample of its own.

    Source: Akiba et al., "Optuna", KDD 2019.
    """
    need("search", "optuna", raises=StudyError)
    import optuna

    for name, x in (("rounds", rounds), ("conditions", conditions)):
        if not is_int(x) or x < 1:
            raise StudyError(f"search {name} is {shown(x)}; it must be an integer of at least 1.")
    if study.grids or study.sample or study.stop:
        raise StudyError("search chooses settings and trials itself: give it a study without grids, sample and stop.")
    checked = Sample(conditions=1, ranges=ranges, kind="random")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    asked = optuna.create_study(
        direction="maximize" if problem.chief.better == "higher" else "minimize",
        sampler=sampler or optuna.samplers.TPESampler(seed=0),
    )
    grids: list[dict[str, Any]] = []
    overwrite = options.pop("overwrite", False)
    for number in range(rounds):
        points = [asked.ask() for _ in range(conditions)]
        proposed = [
            _grid({name: _suggested(point, name, given) for name, given in checked.ranges.items()}) for point in points
        ]
        grids += [grid for grid in proposed if grid not in grids]
        results = run(replace(study, grids=grids), problem, out=out, overwrite=overwrite and number == 0, **options)
        values = {row["trial"]: row[f"val_{problem.metric}"] for row in results.rows if row["status"] == "done"}
        for point, grid in zip(points, proposed, strict=True):
            names = [trial.name for trial in replace(study, grids=[grid], probe_lr=()).trials()]
            scores = [values[name] for name in names if name in values]
            if len(scores) == len(names) and all(map(math.isfinite, scores)):
                asked.tell(point, sum(scores) / len(scores))
            else:
                asked.tell(point, state=optuna.trial.TrialState.FAIL)
    return results


def _suggested(point: Any, name: str, given: Any) -> Any:
    if not isinstance(given, Mapping):
        return point.suggest_categorical(name, list(given))
    low, high, log = given["low"], given["high"], bool(given.get("log"))
    if name in WHOLE:
        return point.suggest_int(name, low, high, log=log)
    return float(f"{point.suggest_float(name, low, high, log=log):.4g}")


def _grid(values: Mapping[str, Any]) -> dict[str, Any]:
    grid = {name: x for name, x in values.items() if not name.startswith("hyper.")}
    hyper = {name.removeprefix("hyper."): x for name, x in values.items() if name.startswith("hyper.")}
    return grid | ({"hyper": hyper} if hyper else {})
