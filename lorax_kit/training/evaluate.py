"""Loss and accuracy of params over a list of batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array

from lorax_kit.core.errors import LoraxError
from lorax_kit.core.paths import Params
from lorax_kit.training.prefix import Parts, split_prefix


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


class SharedPrefix:
    """Evaluates many versions of one model on the same batches, computing once what does not differ between them.

    The same versions, batches and machine give the same bits, one at a time or one after the other.

    Args:
      score: `score(params, batch) -> Score`.
      params: any version.
      trained: paths of the parameters in which versions differ.
      batches: what to evaluate on; the shared part's values stay in memory, about one hidden state per batch.

    Raises:
      LoraxError: there are no batches.
    """

    def __init__(self, score: Scorer, params: Params, trained: Collection[str], batches: Sequence[Any]) -> None:
        if not batches:
            raise LoraxError("there are no examples to evaluate.")
        compiled: dict[Any, Parts] = {}
        self._parts: list[tuple[Parts, Any, list[Any]]] = []
        for batch in batches:
            shapes = tuple((x.shape, x.dtype) for x in jax.tree_util.tree_leaves(batch))
            if shapes not in compiled:
                prefix, suffix = split_prefix(score, params, trained, batch)
                compiled[shapes] = Parts(jax.jit(prefix), jax.jit(suffix))
            parts = compiled[shapes]
            self._parts.append((parts, batch, parts.prefix(params, batch)))

    def __call__(self, params: Params) -> dict[str, float]:
        """{"loss", "accuracy", "examples"} of one version."""
        return mean_scores([parts.suffix(params, batch, shared) for parts, batch, shared in self._parts])


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
