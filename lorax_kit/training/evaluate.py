"""Loss and accuracy of params over a list of batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array

from lorax_kit.core.paths import Params, arrays_only
from lorax_kit.errors import LoraxError
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


def direction(metric: str, better: str | None, known: Mapping[str, str]) -> int:
    """Read which way a metric is better: 1 for "higher", -1 for "lower". Names are not guessed at.

    Args:
      better: what the caller says, or None.
      known: metrics of one meaning, and their direction.

    Raises:
      LoraxError: another word, one that contradicts `known`, or a metric of unknown direction.
    """
    if better is None and metric not in known:
        raise LoraxError(
            f"whether {metric!r} is better when higher or lower is not known.\n"
            "  say so: better='higher' or better='lower'"
        )
    if better is not None and better not in ("higher", "lower"):
        raise LoraxError(f"better is {better!r}; it must be 'higher' or 'lower'.")
    if better is not None and known.get(metric, better) != better:
        raise LoraxError(f"{metric!r} is better when {known[metric]}, and better is {better!r}.\n  leave it out")
    return 1 if (better or known[metric]) == "higher" else -1


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
        arrays, whole = arrays_only(params)

        def score_arrays(arrays: dict[str, Any], batch: Any) -> Score:
            return score(whole(arrays), batch)

        compiled: dict[Any, Parts] = {}
        self._parts: list[tuple[Parts, Any, list[Any]]] = []
        for batch in batches:
            shapes = tuple((x.shape, x.dtype) for x in jax.tree_util.tree_leaves(batch))
            if shapes not in compiled:
                prefix, suffix = split_prefix(score_arrays, arrays, trained, batch)
                compiled[shapes] = Parts(jax.jit(prefix), jax.jit(suffix))
            parts = compiled[shapes]
            self._parts.append((parts, batch, parts.prefix(arrays, batch)))

    def __call__(self, params: Params) -> dict[str, float]:
        """{"loss", "accuracy", "examples"} of one version."""
        arrays, _ = arrays_only(params)
        return mean_scores([parts.suffix(arrays, batch, shared) for parts, batch, shared in self._parts])


def mean_scores(scores: list[Score]) -> dict[str, float]:
    """Add scores up and divide; an empty list or weight raises `LoraxError`."""
    weight = sum(float(s.weight) for s in scores)
    if weight == 0:
        raise LoraxError("there are no examples to evaluate.")
    correct = sum(float(s.correct) for s in scores)
    if correct < 0 or correct > weight * (1 + 1e-6):  # NaN passes: a trial that diverged
        raise LoraxError(
            f"the scores add up to {correct:g} correct of a weight of {weight:g}.\n"
            "  a Score holds sums over a batch's examples: correct lies between 0 and weight"
        )
    return {
        "loss": sum(float(s.loss) for s in scores) / weight,
        "accuracy": correct / weight,
        "examples": int(weight),
    }
