"""Multiple choice by likelihood: of several answers, the one that a decoder finds most likely after the question."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.core.specs.setting import is_int, shown
from lorax_kit.data import Examples, Row, evaluation_batches, key_of, training_stream
from lorax_kit.errors import DataError, StudyError
from lorax_kit.models import Loaded, Tokenizer
from lorax_kit.problem import Problem, Score
from lorax_kit.problems.classify import text_of
from lorax_kit.problems.parts.asked import Asked, chosen, placed_batches
from lorax_kit.problems.parts.rows import TextSettings, facts_of, length_of, load, read_parts
from lorax_kit.tasks import Told, correct, cross_entropies, row_log_likelihoods, told_batch
from lorax_kit.transform import compressed

NEVER = -1e9


class Choices(NamedTuple):
    """A padded batch of questions with C choices each.

    Attributes:
      texts: question and choice, (B, C, T) each; what is told is the choice.
      there: fp32 (B, C), 0 where a question has fewer choices.
      label: int32 (B,), the right one.
      weight: fp32 (B,), 0 for rows that only fill the batch.
    """

    texts: Told
    there: Any
    label: Any
    weight: Any


@dataclass(frozen=True, kw_only=True)
class Choose(TextSettings):
    """Questions, choices and the right one, for a decoder.

    The score of a choice is the mean log-likelihood of its tokens after the question; training raises that of the right
    one against the others (cross-entropy of the scores). Accuracy is the share of questions whose best is right.

    Args:
      question, choices, answer: columns. Choices are a list (JSON Lines), or parted by `separator`; the answer is one
        of them letter by letter, its letter (A, B, ...), or in JSON Lines its number from 0.
      separator: between the choices of a cell.
      prompt: what stands before a choice, with {question} in it.
    """

    model: str = "smollm2"
    question: str = "question"
    choices: str = "choices"
    answer: str = "answer"
    separator: str = "|"
    prompt: str = "Question: {question}\nAnswer:"
    batch_size: int = 4

    roles: ClassVar[tuple[str, ...]] = ("question", "choices", "answer")
    answers: ClassVar[str] = "answer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.prompt, str) or "{question}" not in self.prompt:
            raise StudyError(f"problem prompt is {shown(self.prompt)}; it must be text with {{question}} in it.")
        if not isinstance(self.separator, str) or not self.separator:
            raise StudyError(f"problem separator is {shown(self.separator)}; it must be a string, not empty.")

    def build(self) -> Problem:
        """Load weights and data.

        Raises:
          DataError: fewer than two choices, an answer that is none of them, or as `read_parts`.
          StudyError: the model is no decoder.
        """
        loaded = load(self, "choose", "decoder")
        tokenizer, most = loaded.tokenizer, loaded.positions

        def encode(rows: Sequence[Row]) -> dict[str, Any]:
            pairs = [(row, _choices(self, row)) for row in rows]
            return self._encoded(tokenizer, rows) | {
                "label": [_right(row, choices) for row, choices in pairs],
                "key": [key_of(text_of(row, "question"), *choices) for row, choices in pairs],
            }

        data = read_parts(self, encode, target="label")
        parts = (data.train, data.val, data.test)
        count = max(int(part["ends"].lengths.max()) for part in parts)
        longest = {id(part): _longest(part) for part in parts}
        length = length_of(self, longest[id(data.train)], most)

        def make(part: Examples, index: np.ndarray, size: int, length: int) -> Choices:
            batch = _batch(part, index, size, length, count)
            batch.label[: len(index)] = part["label"][index]
            return batch

        def train(seed: int, start: int) -> Iterator[Choices]:
            return training_stream(
                longest[id(data.train)],
                lambda index, size, length: make(data.train, index, size, length),
                **{"batch_size": self.batch_size, "length": length, "seed": seed, "start": start},
            )

        def evaluated(part: Examples) -> list[Choices]:
            return evaluation_batches(
                longest[id(part)],
                lambda index, size, length: make(part, index, size, length),
                batch_size=self.batch_size,
                buckets=[length],
            )

        def score(scores: Array, batch: Choices) -> Score:
            losses = jnp.sum(cross_entropies(scores, batch.label) * batch.weight)
            return Score(losses, correct(scores, batch.label, batch.weight), jnp.sum(batch.weight))

        cut = sum(int((longest[id(part)] > length).sum()) for part in parts)
        return Problem(
            name="choose",
            params=lambda key: loaded.params,
            apply=_applying(loaded),
            loss=lambda scores, batch: score(scores, batch).loss / jnp.maximum(jnp.sum(batch.weight), 1e-9),
            score=score,
            train=train,
            val=evaluated(data.val),
            test=evaluated(data.test),
            targets=("layer_*/**/kernel",),
            layers=tuple(f"layer_{i}/**" for i in range(loaded.config.num_hidden_layers)),
            places=lambda batch: batch.weight,
            facts=facts_of(self, data, length, "choose", {"cut": cut}),
        )

    def to_answer(self, rows: Sequence[Row], facts: Mapping[str, Any]) -> Asked:
        """Questions and their choices; see `Settings.to_answer`."""
        loaded, length = load(self, "choose", "decoder"), facts["length"]
        choices = [_choices(self, row) for row in rows]
        part = Examples.of(rows, partial(self._encoded, loaded.tokenizer))
        longest, count = _longest(part), max(map(len, choices))

        def make(index: np.ndarray, size: int, length: int) -> Choices:
            return _batch(part, index, size, length, count)

        def answers(outputs: Sequence[np.ndarray]) -> list[dict[str, Any]]:
            picks = [chosen(some, scores[: len(some)]) for some, scores in zip(choices, outputs, strict=True)]
            return [{"answer": one.pop("label"), **one} for one in picks]

        batches = placed_batches(longest, make, batch_size=self.batch_size, buckets=[length])
        return Asked(lambda key: loaded.params, _applying(loaded), batches, answers, int((longest > length).sum()))

    def _encoded(self, tokenizer: Tokenizer, rows: Sequence[Row]) -> dict[str, list[Any]]:
        """The tokens of each row's choices after its question, where each ends, and where its choice starts."""
        fields: dict[str, list[Any]] = {name: [] for name in ("ids", "ends", "starts")}
        for row in rows:
            before = self.prompt.replace("{question}", text_of(row, "question"))
            texts = tokenizer.encode([before, *(f"{before} {choice}" for choice in _choices(self, row))], 2**31)
            fields["ids"].append(np.concatenate(texts[1:]))
            fields["ends"].append(np.cumsum([len(text) for text in texts[1:]]))
            fields["starts"].append([_shared(texts[0], text) for text in texts[1:]])
        return fields


def _batch(part: Examples, index: np.ndarray, size: int, length: int, count: int) -> Choices:
    """Questions with `count` choices each, the labels 0."""
    rows, starts, there = [], [], np.zeros((size, count), np.float32)
    for place, i in enumerate(index):
        given = np.split(part["ids"][i], part["ends"][i][:-1])
        empty = count - len(given)
        # Beyond a question's own choices stands its first one, which is not counted.
        rows += [*given, *[given[0]] * empty]
        starts += [*part["starts"][i], *[part["starts"][i][0]] * empty]
        there[place, : len(given)] = 1
    marks = [np.arange(len(row)) >= start for row, start in zip(rows, starts, strict=True)]
    texts = Told(*(x.reshape(size, count, length) for x in told_batch(rows, marks, size * count, length)))
    return Choices(texts, there, np.zeros(size, np.int32), (np.arange(size) < len(index)).astype(np.float32))


def _applying(loaded: Loaded) -> Callable[[Any, Choices], Array]:
    """(params, batch) -> the score of each choice."""

    def apply(params: Any, batch: Choices) -> Array:
        told = Told(*(x.reshape(-1, x.shape[-1]) for x in batch.texts))
        logits: Any = loaded.model.apply({"params": params}, told.ids, told.mask)
        sums, tokens = row_log_likelihoods(logits, told)
        scores = (sums / jnp.maximum(tokens, 1.0)).reshape(batch.there.shape)
        return jnp.where(batch.there > 0, scores, NEVER)

    return compressed(apply)  # params may be quantised as they were loaded


def _longest(part: Examples) -> np.ndarray:
    """Tokens of each question's longest choice."""
    return np.array([np.diff(part["ends"][i], prepend=0).max() for i in range(len(part))])


def _shared(before: Sequence[int], text: Sequence[int]) -> int:
    """How many tokens two texts begin with alike; a token that reaches into the choice belongs to it."""
    return next((i for i, (x, y) in enumerate(zip(before, text, strict=False)) if x != y), min(len(before), len(text)))


def _choices(settings: Choose, row: Row) -> list[str]:
    """The choices of a row."""
    given = row.cells["choices"]
    parts = given if isinstance(given, list) else str(given).split(settings.separator)
    choices = [str(x).strip() for x in parts]
    if len(choices) < 2 or len(set(choices)) < len(choices) or not all(choices):
        raise DataError(
            f"{row.where}: choices are {shown(given)}; they must be two or more that differ.\n"
            f"  a list in JSON Lines, or parted by separator={settings.separator!r}"
        )
    return choices


def _right(row: Row, choices: Sequence[str]) -> int:
    """The place of the right one among a row's choices."""
    answer = row.cells["answer"]
    text = str(answer).strip()
    if text in choices:  # before a number is taken for a place: what is asked may be a number
        return choices.index(text)
    if is_int(answer) and 0 <= answer < len(choices):
        return int(answer)
    if len(text) == 1 and text in string.ascii_uppercase[: len(choices)]:
        return string.ascii_uppercase.index(text)
    raise DataError(
        f"{row.where}: the answer {shown(answer)} is none of the choices, "
        f"{', '.join(choices)}.\n"
        "  give one of them letter by letter, or its letter: A, B, ..."
    )
