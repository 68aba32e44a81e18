"""What adds up over batches: sums by name, each with the weight that it is divided by at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.core.paths import is_array
from lorax_kit.errors import StudyError
from lorax_kit.training.objective import Weighted


class Score(NamedTuple):
    """Sums over a batch's examples, of a classifier; other models return a mapping from names to sums.

    Attributes:
      loss: fp32 (), sum of losses.
      correct: fp32 (), number right.
      weight: fp32 (), number of examples (padding rows count 0).
    """

    loss: Array
    correct: Array
    weight: Array


Sums = dict[str, Weighted]
"""Name -> (sum over examples, sum of their weights)."""


def sums_of(score: Any, who: str) -> Sums:
    """What `Problem.score` returned, as sums by name.

    Args:
      score: a `Score`, or a mapping from names to sums over the batch's examples (arrays of any shape that is the same
        for every batch) with their common divisor under "weight", or to `lk.Weighted(total, weight)` each.
      who: whose score it is, for errors.

    Raises:
      StudyError: sums without a weight, without "loss", or that are no sums.
    """
    if isinstance(score, Score):
        sums = {"loss": Weighted(score.loss, score.weight), "correct": Weighted(score.correct, score.weight)}
    elif isinstance(score, Mapping):
        weight = score.get("weight")
        sums = {}
        for name, x in score.items():
            if name == "weight":
                continue
            if not isinstance(x, Weighted) and weight is None:
                raise StudyError(
                    f"the score of {who} has sums without a weight: nothing says what {name!r} is divided by.\n"
                    "  add 'weight': how many examples or tokens the batch holds, or return lk.Weighted(total, weight)"
                )
            sums[str(name)] = x if isinstance(x, Weighted) else Weighted(x, weight)
        if "loss" not in sums:
            raise StudyError(
                f"the score of {who} lacks 'loss'; it has {', '.join(map(repr, sums)) or 'nothing'}.\n"
                "  add the sum of the losses over the batch's examples"
            )
    else:
        raise StudyError(
            f"the score of {who} is {_described(score)}.\n"
            "  return lk.Score(loss, correct, weight), or a mapping from names to sums, with their 'weight'"
        )
    for name, x in sums.items():
        for word, part in (("sum", x.total), ("weight", x.weight)):
            if not is_array(part) and not isinstance(part, int | float):
                raise StudyError(f"the {word} of {name!r} in the score of {who} is a {type(part).__name__}.")
            if (word == "weight" or name == "loss") and jnp.shape(part) != ():
                raise StudyError(
                    f"the {word} of {name!r} in the score of {who} has shape {jnp.shape(part)}; it must be a scalar.\n"
                    "  a score holds sums over the batch, not one value per example"
                )
    return {name: Weighted(jnp.asarray(x.total), jnp.asarray(x.weight)) for name, x in sums.items()}


def means_of(parts: Sequence[Sums], who: str, *, whole: bool = True) -> tuple[dict[str, Any], float]:
    """(mean scores over all batches, the weight of the loss): sums are added in float64.

    Args:
      whole: whether these are all batches: then every score must weigh something. Else its mean is NaN.

    Raises:
      StudyError: nothing weighs anything: there are no examples; sums whose shapes differ between batches.
    """
    means: dict[str, Any] = {}
    for name in parts[0] if parts else {}:
        shapes = {np.shape(part[name].total) for part in parts}
        if len(shapes) > 1:
            raise StudyError(f"the sums of {name!r} of {who} have the shapes {sorted(shapes)} in different batches.")
        total = sum(np.asarray(part[name].total, np.float64) for part in parts)
        weight = sum(float(part[name].weight) for part in parts)
        if weight <= 0 and whole:
            raise StudyError(f"the examples of {who} weigh {weight:g} in {name!r}: there are none to evaluate.")
        means[name] = total / weight if weight > 0 else np.full(np.shape(total), np.nan)[()]
    if not means:
        raise StudyError(f"there are no examples of {who} to evaluate.")
    return means, sum(float(part["loss"].weight) for part in parts)


def _described(x: Any) -> str:
    if is_array(x):
        return f"an array of shape {tuple(x.shape)}"
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(x) if is_array(leaf)]
    return f"a {type(x).__name__}" + (f" of shapes {shapes}" if shapes else "")
