"""Metrics as data: a name, the direction in which it is better, and how it is made of a model's scores."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorax_kit.core.paths import is_array
from lorax_kit.core.specs.setting import shown
from lorax_kit.errors import StudyError

BETTER = ("higher", "lower")
RESERVED = ("examples", "loss_per_step")


@dataclass(frozen=True)
class Metric:
    """What a model is worth, as one number, and when it is worth more.

    Args:
      name: letters, digits and `_`; its columns are `val_<name>` and `test_<name>`.
      better: "higher" or "lower". It is never guessed from the name.
      of: how it is computed from the mean scores, a mapping from the names that `Problem.score` gives to means over the
        examples (numpy, float64): the name of one of them, or a function of the mapping. None: the mean score of this
        metric's own name.
      of_outputs: for what does not add up over examples (BLEU, a rank correlation): a function (predictions, batches)
        -> float on the host, where predictions are what `Problem.predict` gave for each batch, as numpy arrays. Not
        together with `of`.
      format: Python's format specification for showing it; one that ends in "%" shows a share as percent, and
        differences as percentage points.
      bounds: the least and the greatest possible value; a value beyond them is an error.

    Raises:
      StudyError: a name that is no column's, an unknown direction, both ways to compute it.

    Example:
      >>> Metric("perplexity", better="lower", of=lambda mean: np.exp(mean["loss"]))({"loss": 0.0})
      1.0
    """

    name: str
    better: str
    of: str | Callable[[Mapping[str, Any]], Any] | None = None
    of_outputs: Callable[[Sequence[Any], Sequence[Any]], float] | None = None
    format: str = ".4g"
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", self.name):
            raise StudyError(f"metric name {shown(self.name)} goes into column names: use letters, digits and '_'.")
        if self.name in RESERVED:
            raise StudyError(f"metric name {self.name!r} is taken.\n  choose another")
        if self.better not in BETTER:
            raise StudyError(
                f"metric {self.name!r} has better={shown(self.better)}; it must be 'higher' or 'lower'.\n"
                "  a direction is never guessed from a name"
            )
        if self.of is not None and self.of_outputs is not None:
            raise StudyError(f"metric {self.name!r} has both of= and of_outputs=; give one.")
        for word, function in (("of", self.of), ("of_outputs", self.of_outputs)):
            if not (function is None or callable(function) or (word == "of" and isinstance(function, str))):
                raise StudyError(f"metric {self.name!r} has {word}={shown(function)}; it must be a function.")
        try:
            format(0.5, self.format)
        except (ValueError, TypeError):
            raise StudyError(
                f"metric {self.name!r} has format={shown(self.format)}; it must be one for a float, such as '.3f'."
            ) from None
        if self.bounds is not None:
            ok = isinstance(self.bounds, tuple | list) and len(self.bounds) == 2 and self.bounds[0] < self.bounds[1]
            if not ok:
                raise StudyError(f"metric {self.name!r} has bounds={shown(self.bounds)}; give (least, greatest).")
            object.__setattr__(self, "bounds", tuple(self.bounds))

    @property
    def sign(self) -> int:
        """1 if it is better when higher, -1 if when lower."""
        return 1 if self.better == "higher" else -1

    def __call__(self, means: Mapping[str, Any]) -> float:
        """Compute it from mean scores.

        Raises:
          StudyError: a score that is not there, a result that is no number or lies beyond the bounds (NaN passes: a
            trial that diverged).
        """
        return self.checked(self.computed(means))

    def computed(self, means: Mapping[str, Any]) -> Any:
        """The value as it comes, within its bounds or not.

        Raises:
          StudyError: a score that is not there.
        """
        try:
            return means[self.of or self.name] if not callable(self.of) else self.of(means)
        except KeyError as e:
            raise StudyError(
                f"metric {self.name!r} reads the score {e.args[0]!r}, which is not there: the scores are "
                f"{', '.join(means)}.\n  return it from Problem.score, or say how it is computed: Metric(..., of=...)"
            ) from None

    def checked(self, value: Any) -> float:
        """The value as a float, within the bounds."""
        if np.shape(value) != () or not (isinstance(value, int | float) or is_array(value)):
            given = f"shape {np.shape(value)}" if np.shape(value) else f"the type {type(value).__name__}"
            raise StudyError(f"metric {self.name!r} came to {given}; it must be one number.")
        number = float(value)
        if self.bounds is not None and not math.isnan(number):
            low, high = self.bounds
            slack = 1e-6 * (high - low)  # sums of fp32
            if not low - slack <= number <= high + slack:
                raise StudyError(
                    f"metric {self.name!r} is {number:g}, and must lie between {low:g} and {high:g}.\n"
                    "  a score holds sums over a batch's examples, and its weight what they are divided by"
                )
        return number

    def to_dict(self) -> dict[str, Any]:
        """What a report needs of it: plain data."""
        return {"name": self.name, "better": self.better, "format": self.format}


def share_metric(name: str, of: Any = None, of_outputs: Any = None) -> Metric:
    """A metric that is a share of what could be, better when higher and shown as percent; see `Metric`."""
    return Metric(name, better="higher", of=of, of_outputs=of_outputs, format=".1%", bounds=(0, 1))


LOSS = Metric("loss", better="lower", format=".4f")
ACCURACY = share_metric("accuracy", of="correct")
PERPLEXITY = Metric("perplexity", better="lower", of=lambda mean: np.exp(mean["loss"]), format=".4g")
MSE = Metric("mse", better="lower", of="squared_error", format=".4g")
STANDARD = {metric.name: metric for metric in (LOSS, ACCURACY, PERPLEXITY, MSE)}
"""Metrics that go by a name alone; every other one says its direction."""


def standard(given: Metric | str) -> Metric:
    """A metric, or the one that goes by a name.

    Raises:
      StudyError: a name that stands for no metric: its direction is not known.
    """
    if isinstance(given, Metric):
        return given
    if isinstance(given, str) and given in STANDARD:
        return STANDARD[given]
    raise StudyError(
        f"metric {shown(given)} is not known, nor whether it is better when higher or lower.\n"
        f"  say so: lk.Metric({given!r}, better=...); by a name alone go {', '.join(STANDARD)}"
    )


def with_loss(given: Iterable[Metric | str]) -> tuple[Metric, ...]:
    """The metrics, the loss first.

    Raises:
      StudyError: two of one name, an unknown name.
    """
    metrics = [standard(one) for one in given]
    out = {"loss": LOSS}
    for metric in metrics:
        if metric.name in out and metric != LOSS:
            raise StudyError(f"there are two metrics named {metric.name!r}.\n  columns go by names: rename one")
        out[metric.name] = metric
    return tuple(out.values())
