"""Beam search: of all texts that the model finds likely, the likeliest that are met by keeping K of each length.

    score(text) = sum of log-probabilities / length^penalty

Shapes: B prompts, K beams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.core.specs.setting import is_int, is_number, shown
from lorax_kit.errors import LoraxError
from lorax_kit.generate.write import Writer, Written, _multiple


def beam_search(
    writer: Writer,
    params: Any,
    prompts: Sequence[str | Sequence[int]],
    *,
    beams: int = 4,
    max_new_tokens: int = 64,
    length_penalty: float = 1.0,
    stop: Sequence[str] = (),
) -> list[Written]:
    """The best text after each prompt.

    A beam ends at an end-of-text token, and then competes with those that go on; the search of a prompt ends when none
    that goes on can score better, as it stands, than the worst of K that have ended (Wu et al., arXiv 1609.08144).

    Args:
      writer, params, prompts, max_new_tokens: as of `Writer`.
      beams: K.
      length_penalty: 0 compares sums, which favours short texts; 1 means.
      stop: strings before which the best text is cut.

    Raises:
      LoraxError: as of `Writer`; a number of beams or a penalty out of range; a `per_row_decoder`.
    """
    if not is_int(beams) or beams < 1:
        raise LoraxError(f"beams is {shown(beams)}; it must be an integer of at least 1.")
    if not is_number(length_penalty):
        raise LoraxError(f"length_penalty is {shown(length_penalty)}; it must be a number.")
    if writer.decoder.per_row:
        raise LoraxError(
            "beams are rows of their own, and params hold an adapter for each row of the prompts alone.\n"
            "  search with one adapter at a time: lorax_kit.generate.adapted"
        )
    rows = writer._rows(prompts, max_new_tokens, 1, stop)
    ids, mask = writer._padded(rows, max_new_tokens)
    decoder = writer.decoder
    held = 0 if decoder.written_alone else ids.shape[1]
    slots = min(_multiple(held + max_new_tokens), decoder.positions or 2**31)
    begin, step = _compiled(writer, beams, slots)
    best, cache = begin(params, ids, mask)
    searches = [_Search(beams, decoder.eos, length_penalty) for _ in rows]
    for number in range(1, max_new_tokens + 1):
        for search, *continuations in zip(searches, *map(np.asarray, best), strict=True):
            search.extend(*continuations, last=number == max_new_tokens)
        if all(search.done for search in searches):
            break
        tokens, parents, scores = zip(*(search.next() for search in searches), strict=True)
        best, cache = step(params, *map(np.asarray, (tokens, parents)), np.asarray(scores, np.float32), cache)
    return [_written(writer, search, row, stop) for search, row in zip(searches, rows, strict=True)]


def _compiled(writer: Writer, beams: int, slots: int) -> tuple[Any, Any]:
    """`begin` and `step`, which give the 2 K best continuations of each prompt's beams: (scores, tokens, parents)."""
    name = ("beams", beams, slots)
    if name not in writer.programs:
        decoder = writer.decoder

        def best(logits: Array, scores: Array) -> tuple[Array, Array, Array]:
            logp = jax.nn.log_softmax(logits, axis=-1).reshape(*scores.shape, -1) + scores[..., None]  # (B, K, V)
            flat = logp.reshape(len(scores), -1)
            values, places = jax.lax.top_k(flat, min(2 * beams, flat.shape[1]))
            return values, places % logp.shape[-1], places // logp.shape[-1]

        def begin(params: Any, ids: Array, mask: Array) -> tuple[Any, Any]:
            logits, cache = decoder.begin(params, ids, mask, slots)
            continuations = best(logits, jnp.zeros((len(ids), 1), jnp.float32))
            return continuations, jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0) if x.ndim else x, cache)

        def step(params: Any, tokens: Array, parents: Array, scores: Array, cache: Any) -> tuple[Any, Any]:
            rows = (jnp.arange(len(parents))[:, None] * beams + parents).reshape(-1)
            cache = jax.tree.map(lambda x: x[rows] if x.ndim else x, cache)
            ids = tokens.reshape(-1, 1)
            logits, cache = decoder.step(params, ids, jnp.ones_like(ids), cache)
            return best(logits, scores), cache

        writer.programs[name] = jax.jit(begin), jax.jit(step, donate_argnums=(4,))
    programs: tuple[Any, Any] = writer.programs[name]
    return programs


@dataclass
class _Search:
    """The beams of one prompt, on the host.

    Attributes:
      beams, eos, penalty: K, ids that end a text, and the power of its length.
      texts, logprobs, sums: of the beams that go on: tokens, log-probability of each, and their sum.
      parents: the beam that each was at the step before.
      ended: (score, tokens, log-probabilities, why) of the best K that have ended.
    """

    beams: int
    eos: Collection[int]
    penalty: float
    texts: list[list[int]] = field(default_factory=lambda: [[]])
    logprobs: list[list[float]] = field(default_factory=lambda: [[]])
    sums: list[float] = field(default_factory=lambda: [0.0])
    parents: list[int] = field(default_factory=list)
    ended: list[tuple[float, list[int], list[float], str]] = field(default_factory=list)
    done: bool = False

    def extend(self, values: np.ndarray, tokens: np.ndarray, parents: np.ndarray, *, last: bool) -> None:
        """Take the best continuations, the likeliest first."""
        if self.done:
            return
        before, logprobs_before, sums = self.texts, self.logprobs, self.sums
        self.texts, self.logprobs, self.sums, self.parents = [], [], [], []
        for value, token, parent in zip(values.tolist(), tokens.tolist(), parents.tolist(), strict=True):
            if value == -np.inf or len(self.texts) == self.beams:
                continue
            text, logprobs = [*before[parent], token], [*logprobs_before[parent], value - sums[parent]]
            if token in self.eos:
                self._end(value, text, logprobs, "eos")
                continue
            self.texts.append(text)
            self.logprobs.append(logprobs)
            self.sums.append(value)
            self.parents.append(parent)
        if last:
            for text, logprobs, total in zip(self.texts, self.logprobs, self.sums, strict=True):
                self._end(total, text, logprobs, "length")
        best = max((self._score(total, len(self.texts[0])) for total in self.sums), default=-np.inf)
        self.done = last or not self.texts or (len(self.ended) == self.beams and self.ended[-1][0] >= best)

    def next(self) -> tuple[list[int], list[int], list[float]]:
        """Last token, parent and score of K beams; those that are missing can never be chosen."""
        empty = self.beams - len(self.texts)
        tokens = [text[-1] for text in self.texts]
        return [*tokens, *[0] * empty], [*self.parents, *[0] * empty], [*self.sums, *[-np.inf] * empty]

    def _score(self, total: float, length: int) -> float:
        return total / length**self.penalty

    def _end(self, total: float, text: list[int], logprobs: list[float], why: str) -> None:
        self.ended.append((self._score(total, len(text)), text, logprobs, why))
        self.ended.sort(key=lambda one: -one[0])
        del self.ended[self.beams :]


def _written(writer: Writer, search: _Search, row: Sequence[int], stop: Sequence[str]) -> Written:
    """The best text that has ended, cut before a stop string."""
    _, tokens, logprobs, why = search.ended[0]
    text = writer.text_after(row, stop)
    for token, logprob in zip(tokens, logprobs, strict=True):
        if not text.finished:
            text.add(token, logprob, writer.decoder.eos)
    return Written(text.whole(), tuple(text.tokens), tuple(text.logprobs), text.finished or why, len(row))
