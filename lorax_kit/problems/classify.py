"""Classification of a user's own texts: one class of any number, or several at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from lorax_kit.core.specs.setting import shown
from lorax_kit.data import Examples, Ragged, Row, key_of, padded
from lorax_kit.errors import DataError, StudyError
from lorax_kit.models import Loaded
from lorax_kit.problem import Problem
from lorax_kit.problem.metric import share_metric
from lorax_kit.problems.parts.asked import Asked, asked_texts, chosen, chosen_several
from lorax_kit.problems.parts.pooled import HEAD, Pooled, pooled
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
from lorax_kit.tasks import macro_f1, micro_f1, one_class_sums, several_classes_sums

HEADS = ("auto", "trained", "fresh")


class Labelled(NamedTuple):
    """A padded batch: ids, mask int32 (B, T); label int32 (B,), or fp32 (B, C) of several; weight fp32 (B,)."""

    ids: Any
    mask: Any
    label: Any
    weight: Any


@dataclass(frozen=True, kw_only=True)
class Classify(TextSettings):
    """Texts and their classes, for a pretrained model with a linear head; measured by accuracy and F1.

    Args:
      text, label: columns.
      separator: between the classes of a text, which may be none; None: each text has one class. JSON Lines may hold
        lists of classes.
      several: a text may have any number of classes; implied by a separator.
      head: "trained": that of the model's folder, whose classes must be those of the data; "fresh"; "auto": the trained
        one where it fits.
    """

    text: str = "text"
    label: str = "label"
    separator: str | None = None
    several: bool = False
    head: str = "auto"

    roles: ClassVar[tuple[str, ...]] = ("text", "label")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.separator is not None and (not isinstance(self.separator, str) or not self.separator):
            raise StudyError(
                f"problem separator is {self.separator!r}; it must be a string that stands between classes."
            )

        if not isinstance(self.several, bool):
            raise StudyError(f"problem several is {shown(self.several)}; it must be true or false.")
        if self.head not in HEADS:
            raise StudyError(f"problem head is {self.head!r}; choose from {', '.join(HEADS)}.")

    def build(self) -> Problem:
        """Load weights and data.

        Raises:
          DataError: one class alone, a class that only a file of validation or test has, or as `read_parts`.
        """
        loaded = load(self, "classify")
        several = self._several
        codes: dict[str, int] = {}

        def encode(rows: Sequence[Row]) -> dict[str, Any]:
            texts = [text_of(row, "text") for row in rows]
            classes = [_classes(self, row, several) for row in rows]
            for name in (name for some in classes for name in some):
                codes.setdefault(name, len(codes))
            given = [[codes[name] for name in some] for some in classes]
            return {
                "ids": loaded.tokenizer.encode(texts, 2**31),
                "label": given if several else [some[0] for some in given],
                "key": [key_of(text) for text in texts],
            }

        most = loaded.positions
        data = read_parts(
            self, encode, stratum=None if several else "label", may_be_empty=("label",) if several else ()
        )
        _check_classes(self, data, [*codes])
        names = sorted(codes)
        if len(names) < 2:
            raise DataError(f"{self.data!r} has one class alone, {names}; two or more are needed.")
        place = np.argsort(np.argsort([*codes]))  # of a code among the sorted names
        length = length_of(self, data.train["ids"].lengths, most)

        def make(part: Examples, index: np.ndarray, size: int, length: int) -> Labelled:
            ids, mask = padded([part["ids"][i] for i in index], size, length)
            label = np.zeros((size, len(names)), np.float32) if several else np.zeros(size, np.int32)
            for row, i in enumerate(index):
                if several:
                    label[row, place[part["label"][i]]] = 1
                else:
                    label[row] = place[part["label"][i]]
            return Labelled(ids, mask, label, (np.arange(size) < len(index)).astype(np.float32))

        model, chosen_head = self._model(loaded, names)
        sums = several_classes_sums if several else one_class_sums
        f1 = share_metric("micro_f1", of=micro_f1) if several else share_metric("macro_f1", of=macro_f1)

        def loss(logits: Any, batch: Labelled) -> Any:
            totals = sums(logits, batch.label, batch.weight)
            return totals["loss"] / jnp.maximum(totals["weight"], 1e-9)

        return Problem(
            name="classify",
            params=model.params,
            apply=model.apply,
            loss=loss,
            score=lambda logits, batch: sums(logits, batch.label, batch.weight),
            metrics=[f1, "accuracy"] if several else ["accuracy", f1],
            head=(f"{HEAD}/**",),
            targets=model.targets,
            layers=model.layers,
            places=lambda batch: batch.weight,
            counts=lambda batch: batch.mask * batch.weight[:, None],
            student=model.student,
            **batches_of(data, make, self, length),
            facts=facts_of(self, data, length, "classify", {"labels": names, "head": chosen_head}),
        )

    def to_answer(self, rows: Sequence[Row], facts: Mapping[str, Any]) -> Asked:
        """Texts to classify; see `Settings.to_answer`."""
        loaded, names = load(self, "classify"), list(facts["labels"])
        ids = loaded.tokenizer.encode([text_of(row, "text") for row in rows], 2**31)
        model, _ = self._model(loaded, names)
        answer = partial(chosen_several if self._several else chosen, names)
        return asked_texts(ids, model.params, model.apply, answer, **evaluated_in(facts["length"]))

    @property
    def _several(self) -> bool:
        return self.several or self.separator is not None

    def _model(self, loaded: Loaded, names: Sequence[str]) -> tuple[Pooled, str]:
        """The model with a head for the classes, and whether that is a trained or a fresh one."""
        trained = None if self._several or self.head == "fresh" else _trained_head(loaded, names)
        if trained is None and self.head == "trained":
            raise StudyError(
                f"{self.model!r} has no trained head for the classes {', '.join(names)}; it has "
                f"{'one for ' + ', '.join(loaded.labels) if loaded.labels else 'none'}."
            )
        return pooled(loaded, len(names), trained), "fresh" if trained is None else "trained"


def _check_classes(settings: Classify, data: Data, names: Sequence[str]) -> None:
    """Raise `DataError` where a file of validation or test has a class that no row to train on has."""
    trained, *others = (
        set(np.unique(labels.flat if isinstance(labels, Ragged) else labels).tolist())
        for labels in (part["label"] for part in data[:3])
    )
    for file, codes in zip((settings.val_data, settings.test_data), others, strict=True):
        if file is not None and (odd := sorted(names[code] for code in codes - trained)):
            raise DataError(
                f"{file!r} has the class {shown(odd[0])}, which no row to train on has; those of {settings.data!r} "
                f"have {', '.join(sorted(names[code] for code in trained))}.\n"
                "  correct it, leave its rows out, or add rows of it to train on"
            )


def _trained_head(loaded: Loaded, names: Sequence[str]) -> Any:
    """The model's own head with its classes in the order of the names; None where it has none for them."""
    head = loaded.heads.get("classify")
    if head is None or sorted(loaded.labels or ()) != list(names):
        return None
    order = np.array([(loaded.labels or ()).index(name) for name in names])
    output = {leaf: x[..., order] for leaf, x in head["output"].items()}
    return {**head, "output": output}


def text_of(row: Row, name: str) -> str:
    """A cell that must be text."""
    value = row.cells[name]
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {name} is {value!r}; it must be text.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DataError(f"{row.where}: {name} holds half of a character (a lone surrogate).") from None
    return value


def _classes(settings: Classify, row: Row, several: bool) -> list[str]:
    """The names of a row's classes."""
    value = row.cells["label"]
    if isinstance(value, list):
        if not several:
            raise DataError(
                f"{row.where}: label is the list {value!r}, of a text that has one class.\n"
                "  say that it may have more: several=true"
            )
        names = [str(x).strip() for x in value]
    elif value is None:
        names = []
    elif settings.separator is not None:
        names = [x.strip() for x in str(value).split(settings.separator) if x.strip()]
    else:
        names = [str(value).strip()] if str(value).strip() else []
    return list(dict.fromkeys(names))
