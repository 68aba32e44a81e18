"""What a study needs to know of a model and a task: pure functions and batches, no files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax import Array

from lorax_kit.core.method import Hints
from lorax_kit.core.paths import Params, arrays_only, flatten, is_array, is_state
from lorax_kit.errors import StudyError
from lorax_kit.training.evaluate import Score


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model on a task.

    Attributes:
      name: what adapters remember, so that they can be evaluated later.
      params: key -> params. Everything but the head is the same for every key, in the same buffers.
      apply: (params, batch) -> outputs.
      loss: (outputs, batch) -> mean loss, fp32 ().
      score: (outputs, batch) -> sums over the batch's examples.
      head: patterns of the parameters trained in full.
      train: (seed, start) -> endless batches from step `start`. They may have a few shapes: the step is compiled once
        for each, the first must be the largest, and at one step all seeds must have the same.
      val, test: batches that cover each example once.
      facts: plain data for the report: sizes, sources.
      hints: path -> what starts that look at data read, from `lk.calibrate`; None where the study has no such start.
    """

    name: str
    params: Callable[[Array], Params]
    apply: Callable[[Params, Any], Any]
    loss: Callable[[Any, Any], Array]
    score: Callable[[Any, Any], Score]
    head: tuple[str, ...]
    train: Callable[[int, int], Iterator[Any]]
    val: Sequence[Any]
    test: Sequence[Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    hints: Mapping[str, Hints] | None = None


def check_batches(problem: Problem) -> None:
    """Raise `StudyError` unless the validation and test batches are there, and can be read many times."""
    for name in ("val", "test"):
        batches = getattr(problem, name)
        if not isinstance(batches, Sequence):
            raise StudyError(
                f"{name} of problem {problem.name!r} is a {type(batches).__name__}; it is read many times.\n"
                "  give a list of batches"
            )
    if not problem.val or not problem.test:
        raise StudyError(f"problem {problem.name!r} has no validation or test examples.")


def check_score(problem: Problem, params: Params) -> None:
    """Raise `StudyError` unless the score of a batch is a `Score` of three scalars. Nothing is computed."""
    arrays, whole = arrays_only(params)

    def score(arrays: Mapping[str, Any], batch: Any) -> Any:
        return problem.score(problem.apply(whole(arrays), batch), batch)

    for batch in (problem.val[0], problem.test[0]):
        found = jax.eval_shape(score, arrays, batch)
        if not isinstance(found, Score) or any(x.shape != () for x in found):
            shapes = [getattr(x, "shape", x) for x in jax.tree.leaves(found)]
            raise StudyError(
                f"score of problem {problem.name!r} gives a {type(found).__name__} of shapes {shapes}.\n"
                "  return lk.Score(loss, correct, weight): three sums over the batch, each a scalar"
            )


def check_base(problem: Problem, params: Params, head: Collection[str], key: Array) -> None:
    """Raise `StudyError` unless `problem.params` gives another key the same parameters outside of the head.

    Trials share one base: what a key decides beyond the head would train over, and be saved for, another one.

    Args:
      params: those of the shared base.
      head: paths of the parameters trained in full.
      key: any other key.
    """
    ours, theirs = flatten(params)[0], flatten(problem.params(key))[0]
    if odd := sorted(set(ours) ^ set(theirs)):
        raise StudyError(f"params of problem {problem.name!r} has {odd[0]!r} for one key, and lacks it for another.")
    for path, x in ours.items():
        y = theirs[path]
        if y is x or not is_array(x) or is_state(x):
            continue
        ours_parts, theirs_parts = jax.tree.leaves(x), jax.tree.leaves(y)
        pairs = list(zip(ours_parts, theirs_parts, strict=False))
        if len(ours_parts) != len(theirs_parts) or any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in pairs):
            raise StudyError(f"{path!r} of problem {problem.name!r} has another shape or dtype for another key.")
        if path not in head and not all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs):
            raise StudyError(
                f"{path!r} of problem {problem.name!r} depends on the key, and is not in its head.\n"
                f"  all trials share one base: draw {path!r} from a key of its own, or name it in Problem(head=...)"
            )
