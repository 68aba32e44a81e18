"""Extractive question answering on a user's own passages: the answer is a span of the passage."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.core.specs.setting import is_int, shown
from lorax_kit.data import Examples, Row, key_of, padded
from lorax_kit.errors import DataError, StudyError
from lorax_kit.models.heads import answer, fresh_head
from lorax_kit.models.text.tokenizer import Window
from lorax_kit.problem import Problem
from lorax_kit.problem.metric import share_metric
from lorax_kit.problems.classify import text_of
from lorax_kit.problems.parts.asked import Asked, placed_batches
from lorax_kit.problems.parts.rows import (
    TextSettings,
    batches_of,
    check_length,
    evaluated_in,
    facts_of,
    load,
    read_parts,
)
from lorax_kit.tasks import Spans, best_spans, exact_match, span_losses, word_f1
from lorax_kit.transform import compressed

if TYPE_CHECKING:
    from lorax_kit.models import Loaded

HEAD, DEFAULT_LENGTH, DEFAULT_OVERLAP = "answer", 256, 64


class Held(NamedTuple):
    """What the host needs of a window: the row it is of, the passage, the characters of its tokens, right answers."""

    row: tuple[str, int]
    passage: str
    spans: list[tuple[int, int]]
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Answer(TextSettings):
    """Questions, passages and answers, for an encoder with a head for first and last token; exact match and F1.

    Longer passages are cut into windows; the best span of all is the answer. Questions about one passage stay in one
    part.

    Args:
      question, context, answer: columns. JSON Lines may hold lists of answers: the first is trained on, and any of
        them is right.
      length: of question and window, in tokens; None: 256, or what the model takes.
      overlap: tokens that a window shares with the one before it; None: 64, or half of a length below 128.
    """

    question: str = "question"
    context: str = "context"
    answer: str = "answer"
    overlap: int | None = None

    roles: ClassVar[tuple[str, ...]] = ("question", "context", "answer")
    answers: ClassVar[str] = "answer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlap is not None and (not is_int(self.overlap) or self.overlap < 0):
            raise StudyError(f"problem overlap is {shown(self.overlap)}; it must be an integer of at least 0.")

    def build(self) -> Problem:
        """Load weights and data.

        Raises:
          DataError: an answer that does not stand in its passage, or as `read_parts`.
          StudyError: the model is no encoder.
        """
        loaded = load(self, "qa", "encoder")
        check_length(self, loaded.positions)
        length = self.length or min(DEFAULT_LENGTH, loaded.positions or DEFAULT_LENGTH)
        held: list[Held] = []
        data = read_parts(self, self._encoding(loaded, length, held, _answers), group="passage", target="told")
        apply = _applying(loaded)
        batches = batches_of(data, _batch, self, length)

        def score(logits: Any, batch: Spans) -> dict[str, Array]:
            losses = span_losses(logits, batch)
            return {"loss": jnp.sum(losses * batch.weight), "weight": jnp.sum(batch.weight)}

        return Problem(
            name="qa",
            params=_params(loaded),
            apply=apply,
            loss=lambda logits, batch: score(logits, batch)["loss"] / jnp.maximum(jnp.sum(batch.weight), 1e-9),
            score=score,
            metrics=[
                share_metric("f1", of_outputs=_mean_over_rows(held, word_f1)),
                share_metric("exact_match", of_outputs=_mean_over_rows(held, exact_match)),
            ],
            predict=lambda logits, batch: best_spans(logits, batch.inside),
            head=(f"{HEAD}/**",),
            targets=("encoder/layer_*/**/kernel",),
            layers=tuple(f"encoder/layer_{i}/**" for i in range(loaded.config.num_hidden_layers)),
            counts=lambda batch: batch.mask * batch.weight[:, None],
            **batches,
            facts=facts_of(self, data, length, "qa", {}),
        )

    def to_answer(self, rows: Sequence[Row], facts: Mapping[str, Any]) -> Asked:
        """Questions and passages; see `Settings.to_answer`."""
        loaded, length, held = load(self, "qa", "encoder"), facts["length"], list[Held]()
        part = Examples.of(rows, self._encoding(loaded, length, held, lambda row, passage: (("",), len(passage))))
        apply = _applying(loaded)

        def answers(outputs: Sequence[np.ndarray]) -> list[dict[str, Any]]:
            best = _best(held, zip(range(len(held)), outputs, strict=True))
            return [{"answer": text, "score": score} for score, text, _ in best.values()]

        return Asked(
            _params(loaded),
            lambda params, batch: best_spans(apply(params, batch), batch.inside),
            placed_batches(part["ids"].lengths, partial(_batch, part), **evaluated_in(length)),
            answers,
        )

    def _encoding(
        self, loaded: Loaded, length: int, held: list[Held], right: Callable[[Row, str], tuple[tuple[str, ...], int]]
    ) -> Callable[[Sequence[Row]], dict[str, Any]]:
        """Rows to windows; `held` gets what the host needs of each, `right` gives the answers of a row."""
        overlap = min(DEFAULT_OVERLAP, length // 2) if self.overlap is None else self.overlap

        def encode(rows: Sequence[Row]) -> dict[str, Any]:
            fields: dict[str, list[Any]] = {
                name: []
                for name in ("ids", "types", "inside", "start", "end", "number", "key", "passage", "told", "line")
            }
            pairs = [(text_of(row, "question"), text_of(row, "context")) for row in rows]
            known = [right(row, passage) for row, (_, passage) in zip(rows, pairs, strict=True)]
            cut = loaded.tokenizer.encode_pairs(pairs, length, overlap)
            for row, (question, passage), (answers, at), windows in zip(rows, pairs, known, cut, strict=True):
                for place, window in enumerate(windows):
                    start, end = _tokens_of(window, at, at + len(answers[0]))
                    inside = [int(span[0] >= 0) for span in window.spans]
                    key = key_of(question, passage, str(place))
                    text = (window.ids, window.types, inside, start, end, len(held))
                    values = (*text, key, key_of(passage), key_of(*answers), row.line)
                    for name, value in zip(fields, values, strict=True):
                        fields[name].append(value)
                    held.append(Held((question, row.line), passage, window.spans, answers))
            return fields

        return encode


def _batch(part: Examples, index: np.ndarray, size: int, length: int) -> Spans:
    ids, mask = padded([part["ids"][i] for i in index], size, length)
    types, inside = np.zeros_like(ids), np.zeros_like(ids)
    ends = np.zeros((3, size), np.int32)
    for row, i in enumerate(index):
        for whole, name in ((types, "types"), (inside, "inside")):
            whole[row, : len(part[name][i])] = part[name][i]
        ends[:, row] = part["start"][i], part["end"][i], part["number"][i]
    weight = (np.arange(size) < len(index)).astype(np.float32)
    return Spans(ids, mask, types, inside, ends[0], ends[1], weight, ends[2])


def _answers(row: Row, passage: str) -> tuple[tuple[str, ...], int]:
    """The right answers, and where the first begins in the passage."""
    value = row.cells["answer"]
    answers = tuple(value) if isinstance(value, list) else (value,)
    if not answers or not all(isinstance(x, str) and x.strip() for x in answers):
        raise DataError(f"{row.where}: answer is {shown(value)}; it must be text, or a list of texts.")
    answers = tuple(x.strip() for x in answers)
    at = _place(passage, answers[0])
    if at is None:
        raise DataError(
            f"{row.where}: the answer {answers[0][:60]!r} does not stand in the passage.\n"
            "  answers are spans of their passage, letter by letter"
        )
    return answers, at


def _place(passage: str, answer: str) -> int | None:
    """Where an answer stands: as a word of its own before within another, letter by letter before in other case."""
    for before, after in (("(?<!\\w)", "(?!\\w)"), ("", "")):
        for flags in (0, re.IGNORECASE):
            if match := re.search(before + re.escape(answer) + after, passage, flags):
                return match.start()
    return None


def _tokens_of(window: Window, start: int, end: int) -> tuple[int, int]:
    """First and last token of the characters [start, end); (0, 0) where the window does not hold them all."""
    inside = [i for i, (a, b) in enumerate(window.spans) if a >= 0 and a < end and b > start]
    if not inside or window.spans[inside[0]][0] > start or window.spans[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def _params(loaded: Loaded) -> Callable[[Array], dict[str, Any]]:
    """The encoder, and its trained head where it has one, else a fresh one."""

    def params(key: Array) -> dict[str, Any]:
        return {"encoder": loaded.params, HEAD: loaded.heads.get(HEAD) or fresh_head(loaded.config.hidden_size, 2, key)}

    return params


def _applying(loaded: Loaded) -> Callable[[Any, Spans], Array]:
    def apply(params: Any, batch: Spans) -> Array:
        hidden: Any = loaded.model.apply({"params": params["encoder"]}, batch.ids, batch.mask, batch.types)
        return jnp.stack(answer(params[HEAD], hidden), axis=-1)

    return compressed(apply)  # params may be quantised as they were loaded


def _mean_over_rows(held: Sequence[Held], measure: Callable[[str, str], float]) -> Callable[..., float]:
    """The mean over questions of the best window's answer, measured against the nearest of the right ones."""

    def metric(predictions: Sequence[np.ndarray], batches: Sequence[Spans]) -> float:
        numbered = (
            (int(number), span)
            for spans, batch in zip(predictions, batches, strict=True)
            for number, span in zip(batch.number[batch.weight > 0], spans[batch.weight > 0], strict=True)
        )
        best = _best(held, numbered).values()
        return float(np.mean([max(measure(text, answer) for answer in answers) for _, text, answers in best]))

    return metric


def _best(
    held: Sequence[Held], numbered: Iterable[tuple[int, np.ndarray]]
) -> dict[tuple[str, int], tuple[float, str, tuple[str, ...]]]:
    """Row -> (score, answer, right answers) of its best window, of (which window, its best span)."""
    best: dict[tuple[str, int], tuple[float, str, tuple[str, ...]]] = {}
    for number, (first, last, score) in numbered:
        window = held[number]
        if window.row not in best or score > best[window.row][0]:
            text = window.passage[window.spans[int(first)][0] : window.spans[int(last)][1]]
            best[window.row] = (float(score), text, window.answers)
    return best
