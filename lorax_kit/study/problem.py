"""What a study needs to know of a model and a task: pure functions and batches, no files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax import Array

from lorax_kit.core.method import Hints
from lorax_kit.core.paths import Params
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
