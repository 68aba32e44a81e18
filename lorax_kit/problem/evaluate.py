"""The metrics of a model over a list of batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lorax_kit.core.merge import merge
from lorax_kit.core.paths import Params, arrays_only, flatten
from lorax_kit.core.plan import Plan
from lorax_kit.core.quantised import Quantised
from lorax_kit.errors import LoraxError, StudyError
from lorax_kit.problem.sums import Sums, means_of, sums_of
from lorax_kit.training.objective import Weighted
from lorax_kit.training.prefix import Parts, split_prefix
from lorax_kit.transform.adapt import adapt

if TYPE_CHECKING:
    from lorax_kit.problem.problem import Problem


def score_of(problem: Problem, outputs: Any, batch: Any) -> Any:
    """What the problem's `score` gives for a batch; without one, its loss.

    Raises:
      StudyError: there is no score, and the loss does not say what it weighs.
    """
    if problem.score is not None:
        return problem.score(outputs, batch)
    loss = problem.loss(outputs, batch)
    if not isinstance(loss, Weighted):
        raise StudyError(
            f"problem {problem.name!r} has no score, and its loss is a mean of which nobody knows the weight.\n"
            "  give score=, or return lk.Weighted(sum of losses, their weight) from the loss"
        )
    return {"loss": loss}


def scored(problem: Problem, outputs: Any, batch: Any) -> tuple[Sums, Any]:
    """(sums of a batch, predictions or None where no metric reads them); traced."""
    sums = sums_of(score_of(problem, outputs, batch), f"problem {problem.name!r}")
    if not problem.reads_outputs:
        return sums, None
    return sums, outputs if problem.predict is None else problem.predict(outputs, batch)


def measured(problem: Problem, params: Any, batch: Any, plan: Plan | None = None) -> tuple[Sums, Any]:
    """What `scored` gives for a model's outputs; by the problem's `sums`, where no metric reads outputs; traced."""
    given = (params,) if plan is None else params

    def run(fn: Callable[..., Any]) -> Any:
        return (fn if plan is None else adapt(fn, plan))(*given, batch)

    if problem.sums is None or problem.reads_outputs:
        return scored(problem, run(problem.apply), batch)
    return sums_of(run(problem.sums), f"problem {problem.name!r}"), None


def summarised(
    problem: Problem, parts: Sequence[tuple[Sums, Any]], batches: Sequence[Any], *, whole: bool = True
) -> dict[str, float]:
    """Metrics by name, and "examples" (the weight of the loss), from what `scored` gave for each batch."""
    means, weight = means_of([sums for sums, _ in parts], f"problem {problem.name!r}", whole=whole)
    metrics: dict[str, float] = {}
    predictions = [prediction for _, prediction in parts]
    for metric in problem.all_metrics:
        try:
            value = metric.computed(means) if metric.of_outputs is None else metric.of_outputs(predictions, batches)
        except LoraxError:
            raise
        except (ArithmeticError, ValueError) as e:  # of a model that is lost: it must not end a study
            warnings.warn(f"metric {metric.name!r} of {problem.name!r} cannot be computed: {e!r}", stacklevel=2)
            value = math.nan
        metrics[metric.name] = metric.checked(value)
    return metrics | {"examples": int(weight) if weight == int(weight) else weight}


def form_of_batch(batch: Any) -> Any:
    """What a program is compiled for: the structure of a batch, static fields and all, and the shapes of its arrays."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple((np.shape(x), str(getattr(x, "dtype", type(x)))) for x in leaves)


class Evaluator:
    """Measures many versions of one model on the same batches, computing once what does not differ between them.

    The same versions, batches and machine give the same bits, one at a time or one after the other.

    Args:
      problem: whose `apply`, `score` and metrics count.
      params: any version.
      trained: paths of the parameters in which versions differ.
      batches: what to evaluate on; the shared part's values stay in memory, about one hidden state per batch.
      like: an evaluator of the same model on other batches, whose compiled programs this one shares.
      plan: of versions that stay factored, over a quantised base say: `params` are then (base, factors). None: whole
        params.

    Raises:
      StudyError: there are no batches.
    """

    def __init__(
        self,
        problem: Problem,
        params: Params,
        trained: Collection[str],
        batches: Sequence[Any],
        like: Evaluator | None = None,
        plan: Plan | None = None,
    ) -> None:
        if not batches:
            raise StudyError(f"there are no examples of problem {problem.name!r} to evaluate.")
        self._problem, self._batches = problem, batches
        _, whole = arrays_only(params)

        def score(arrays: dict[str, Any], batch: Any) -> Any:
            return measured(problem, whole(arrays), batch, plan)

        self._score, self._trained = score, trained
        self._compiled: dict[Any, Parts] = {} if like is None else like._compiled
        self._shared: dict[int, list[Any]] = {}

    def _measured(self, arrays: dict[str, Any], number: int) -> tuple[Sums, Any]:
        batch = self._batches[number]
        form = form_of_batch(batch)
        if form not in self._compiled:
            prefix, suffix = split_prefix(self._score, arrays, self._trained, batch)
            self._compiled[form] = Parts(jax.jit(prefix), jax.jit(suffix))
        parts = self._compiled[form]
        if number not in self._shared:
            self._shared[number] = parts.prefix(arrays, batch)
        outcome: tuple[Sums, Any] = parts.suffix(arrays, batch, self._shared[number])
        return outcome

    def __call__(self, params: Params) -> dict[str, float]:
        """The metrics of one version by name, and "examples"."""
        return self._over(params, len(self._batches))

    def check(self, params: Params) -> dict[str, float]:
        """Measure the first batch alone: a score out of range is to be known before hours of training.

        Raises:
          StudyError: what a whole evaluation raises.
        """
        return self._over(params, 1)

    def _over(self, params: Params, count: int) -> dict[str, float]:
        arrays, _ = arrays_only(params)
        parts = [self._measured(arrays, number) for number in range(count)]
        return summarised(
            self._problem, jax.device_get(parts), self._batches[:count], whole=count == len(self._batches)
        )


def val_and_test(
    problem: Problem, params: Params, trained: Collection[str], plan: Plan | None = None
) -> tuple[Evaluator, Evaluator]:
    """Evaluators of a problem's two sets, which compile once for batches of one shape."""
    val = Evaluator(problem, params, trained, problem.val, plan=plan)
    return val, Evaluator(problem, params, trained, problem.test, like=val, plan=plan)


def version(base: Params, factors: Any, plan: Plan) -> tuple[Any, Collection[str], Plan | None]:
    """An adapted model as an evaluator takes it: (params, paths in which others differ, plan).

    It is merged, or, where parameters are quantised, stays factored: restored all at once they would take their memory
    in fp32.
    """
    if not any(isinstance(x, Quantised) for x in flatten(base)[0].values()):
        return merge(base, factors, plan), plan.trained, None
    whole = (base, factors)
    return whole, [path for path in flatten(whole)[0] if path.startswith("1/")], plan
