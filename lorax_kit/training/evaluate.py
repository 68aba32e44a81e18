"""Loss and accuracy of params over a list of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax import Array

from lorax_kit.core.errors import LoraxError
from lorax_kit.core.paths import Params


class Score(NamedTuple):
    """Sums over a batch's examples, so that batches of any size add up exactly.

    Attributes:
      loss: fp32 (), sum of losses.
      correct: fp32 (), number right.
      weight: fp32 (), number of examples (padding rows count 0).
    """

    loss: Array
    correct: Array
    weight: Array


Scorer = Callable[[Params, Any], Score]


def evaluate(score: Scorer, params: Params, batches: Iterable[Any]) -> dict[str, float]:
    """Mean loss and accuracy.

    Args:
      score: `score(params, batch) -> Score`; compiled once per batch shape.
      params: of the model, merged or plain.
      batches: any number of batches.

    Returns:
      {"loss", "accuracy", "examples"}.

    Raises:
      LoraxError: there is nothing to evaluate.
    """
    run = jax.jit(score)
    scores = [run(params, batch) for batch in batches]
    return mean_scores(scores)


def mean_scores(scores: list[Score]) -> dict[str, float]:
    """Add scores up and divide; an empty list or weight raises `LoraxError`."""
    weight = sum(float(s.weight) for s in scores)
    if weight == 0:
        raise LoraxError("there are no examples to evaluate.")
    return {
        "loss": sum(float(s.loss) for s in scores) / weight,
        "accuracy": sum(float(s.correct) for s in scores) / weight,
        "examples": int(weight),
    }
