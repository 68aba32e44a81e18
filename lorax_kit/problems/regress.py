"""Regression on a user's own texts: a number for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lorax_kit.core.specs.setting import is_number, shown
from lorax_kit.data import Examples, Row, key_of, padded
from lorax_kit.errors import DataError, StudyError
from lorax_kit.problem import Metric, Problem
from lorax_kit.problems.classify import Labelled, text_of
from lorax_kit.problems.parts.asked import Asked, asked_texts
from lorax_kit.problems.parts.pooled import HEAD, pooled
from lorax_kit.problems.parts.rows import (
    Data,
    TextSettings,
    batches_of,
    evaluated_in,
    facts_of,
    length_of,
    load,
    read_parts,
)
from lorax_kit.tasks import number_sums, pearson

FARTHEST = 1e9
"""Spreads from the mean: beyond them one row's squared error is all that fp32 sums hold of a batch."""


@dataclass(frozen=True, kw_only=True)
class Regress(TextSettings):
    """Texts and a number each, for a pretrained model with a linear head.

    It is trained on numbers that are shifted and scaled to mean 0 and spread 1 over the training rows; errors are
    measured in the numbers' own units.

    Args:
      text, label: columns.
      centre, spread: what labels are shifted and divided by, for the head to learn; None: mean and standard deviation
        of the training labels, which adapters remember.
    """

    text: str = "text"
    label: str = "label"
    centre: float | None = None
    spread: float | None = None

    roles: ClassVar[tuple[str, ...]] = ("text", "label")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("centre", "spread"):
            x = getattr(self, name)
            if x is not None and (not is_number(x) or (name == "spread" and x <= 0)):
                raise StudyError(f"problem {name} is {shown(x)}; it must be a number, and a spread above 0.")

    def build(self) -> Problem:
        """Load weights and data.

        Raises:
          DataError: a label that is no number, labels that do not vary, or as `read_parts`.
        """
        loaded = load(self, "regress")
        most = loaded.positions

        def encode(rows: Sequence[Row]) -> dict[str, Any]:
            texts = [text_of(row, "text") for row in rows]
            return {
                "ids": loaded.tokenizer.encode(texts, 2**31),
                "label": [_number(row) for row in rows],
                "key": [key_of(text) for text in texts],
            }

        data = read_parts(self, encode, target="label")
        with np.errstate(over="ignore", invalid="ignore"):
            mean, spread = (
                float(of(data.train["label"])) if given is None else float(given)
                for of, given in ((np.mean, self.centre), (np.std, self.spread))
            )
        _check_labels(self, data, mean, spread)
        length = length_of(self, data.train["ids"].lengths, most)

        def make(part: Examples, index: np.ndarray, size: int, length: int) -> Labelled:
            ids, mask = padded([part["ids"][i] for i in index], size, length)
            label = np.zeros(size, np.float32)
            label[: len(index)] = (part["label"][index] - mean) / spread
            return Labelled(ids, mask, label, (np.arange(size) < len(index)).astype(np.float32))

        model = pooled(loaded, 1)

        def sums(outputs: Any, batch: Labelled) -> dict[str, Any]:
            return number_sums(outputs[:, 0], batch.label, batch.weight)

        def loss(outputs: Any, batch: Labelled) -> Any:
            totals = sums(outputs, batch)
            return totals["loss"] / jnp.maximum(totals["weight"], 1e-9)

        return Problem(
            name="regress",
            params=model.params,
            apply=model.apply,
            loss=loss,
            score=sums,
            metrics=[
                Metric("rmse", better="lower", of=lambda found: spread * np.sqrt(found["loss"])),
                Metric("mae", better="lower", of=lambda found: spread * found["absolute_error"]),
                Metric("pearson", better="higher", of_outputs=_correlation, format=".3f", bounds=(-1, 1)),
            ],
            head=(f"{HEAD}/**",),
            targets=model.targets,
            layers=model.layers,
            counts=lambda batch: batch.mask * batch.weight[:, None],
            student=model.student,
            **batches_of(data, make, self, length),
            facts=facts_of(
                replace(self, centre=mean, spread=spread),
                data,
                length,
                "regress",
                {"label_mean": mean, "label_spread": spread},
            ),
        )

    def to_answer(self, rows: Sequence[Row], facts: Mapping[str, Any]) -> Asked:
        """Texts to find the numbers of; see `Settings.to_answer`."""
        loaded = load(self, "regress")
        model = pooled(loaded, 1)
        ids = loaded.tokenizer.encode([text_of(row, "text") for row in rows], 2**31)
        assert self.centre is not None  # an adapter remembers both
        assert self.spread is not None
        centre, spread = self.centre, self.spread

        def answer(outputs: np.ndarray) -> dict[str, Any]:
            return {"value": centre + spread * float(outputs[0])}

        return asked_texts(ids, model.params, model.apply, answer, **evaluated_in(facts["length"]))


def _check_labels(settings: Regress, data: Data, mean: float, spread: float) -> None:
    """Raise `DataError` where labels do not vary, or are numbers that cannot be shifted and scaled to fp32."""
    train = data.train["label"]
    if settings.spread is None and train.min() == train.max():
        raise DataError(f"{settings.data!r}: every training row has the label {mean:g}; there is nothing to learn.")
    if not (math.isfinite(mean) and 0 < spread < math.inf):
        raise DataError(
            f"{settings.data!r}: the labels lie between {train.min():g} and {train.max():g}: their mean is {mean:g}, "
            f"their spread {spread:g}.\n  write them in another unit"
        )
    for name, part in zip(("data", "val_data", "test_data"), data[:3], strict=True):
        far = np.abs(part["label"] / spread - mean / spread)
        if far.max() > FARTHEST:
            at = int(far.argmax())
            raise DataError(
                f"{getattr(settings, name) or settings.data!r}, line {part.lines[at]}: label {part['label'][at]:g} "
                f"lies {far[at]:.0e} times the spread {spread:g} from the mean {mean:g} of the training rows.\n"
                "  correct it, or leave the row out"
            )


def _correlation(predictions: Sequence[np.ndarray], batches: Sequence[Labelled]) -> float:
    there = [batch.weight > 0 for batch in batches]
    predicted = np.concatenate([x[kept, 0] for x, kept in zip(predictions, there, strict=True)])
    return pearson(predicted, np.concatenate([batch.label[kept] for batch, kept in zip(batches, there, strict=True)]))


def _number(row: Row) -> float:
    value = row.cells["label"]
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{row.where}: label is {value!r}; it must be a finite number.")
    return number
