"""Where a training stands, on the host: of a pack, or of each of its trials alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np


class Progress(NamedTuple):
    """A training under way, on the host: all that going on needs.

    Attributes:
      running: the leaves of `Running`, but the trials' keys, which their seeds give.
      losses, failed, evaluations, seconds: as in `Trained`, so far.
    """

    running: list[np.ndarray]
    losses: np.ndarray
    failed: np.ndarray
    evaluations: list[tuple[int, list[dict[str, float]]]]
    seconds: float


class Trained(NamedTuple):
    """What a pack came to.

    Attributes:
      factors: stacked, as trained.
      losses: fp32 (steps, trials).
      failed: int (trials,): the first step (from 1) whose loss or gradient was not finite; 0 for none.
      evaluations: (step, list of one metrics dict per trial; none for the copies that fill a pack).
      seconds, compile_seconds: wall time of the steps, and of compiling them.
      temp_bytes: temporaries of the compiled step, as XLA counts them; of the largest, when batches differ in shape.
      collective_bytes: what a device sends or receives in a step; of the largest, too.
    """

    factors: Any
    losses: np.ndarray
    failed: np.ndarray
    evaluations: list[tuple[int, list[dict[str, float]]]]
    seconds: float
    compile_seconds: float
    temp_bytes: int
    collective_bytes: int = 0


class Course:
    """What a training came to so far, and the time that its steps took; it goes on where `earlier` stands.

    Attributes:
      losses: (trials,) of each step.
      failed, evaluations: as in `Trained`.
    """

    def __init__(self, trials: int, earlier: Progress | None = None) -> None:
        self.losses = [] if earlier is None else list(earlier.losses)
        self.failed = np.zeros(trials, int) if earlier is None else earlier.failed
        self.evaluations = [] if earlier is None else list(earlier.evaluations)
        self._began, self._earlier = perf_counter(), 0.0 if earlier is None else earlier.seconds

    @property
    def steps(self) -> int:
        """How many were trained."""
        return len(self.losses)

    def note(self, losses: np.ndarray, finite: np.ndarray) -> None:
        """Add a step."""
        self.losses.append(losses)
        self.failed = np.where((self.failed == 0) & ~finite, self.steps, self.failed)

    def validated(self, step: int) -> bool:
        """Whether that was done."""
        return any(number == step for number, _ in self.evaluations)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is none of the steps'."""
        at = perf_counter()
        try:
            yield
        finally:
            self._began += perf_counter() - at

    def progress(self, running: list[np.ndarray]) -> Progress:
        """The course so far, with the leaves of the state."""
        seconds = self._earlier + perf_counter() - self._began
        return Progress(running, np.stack(self.losses), self.failed, self.evaluations, seconds)


def parted(progress: Progress, count: int) -> list[Progress]:
    """The progress of each of the first `count` trials of a pack, alone."""
    return [
        Progress(
            [x[i : i + 1] for x in progress.running],
            progress.losses[:, i : i + 1],
            progress.failed[i : i + 1],
            [(step, [found[i]]) for step, found in progress.evaluations],
            progress.seconds / count,
        )
        for i in range(count)
    ]


def joined(slots: Sequence[Progress], size: int) -> Progress:
    """Trials that were trained equally far, as the progress of one pack; filled up with copies of the last."""
    unpadded = slots
    slots = [*slots, *[slots[-1]] * (size - len(slots))]
    return Progress(
        [np.concatenate(leaves) for leaves in zip(*(slot.running for slot in slots), strict=True)],
        np.concatenate([slot.losses for slot in slots], axis=1),
        np.concatenate([slot.failed for slot in slots]),
        [
            (together[0][0], [found[0] for _, found in together])
            for together in zip(*(slot.evaluations for slot in unpadded), strict=True)
        ],
        sum(slot.seconds for slot in unpadded),
    )
