"""Answers that stand in a passage: the loss of their first and last token, and how found answers are measured."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

if TYPE_CHECKING:
    from jaxtyping import Float, Int

MOST_TOKENS = 30
"""Of an answer that is found."""


class Spans(NamedTuple):
    """A padded batch of questions and windows of passages.

    Attributes:
      ids, mask, types: int32 (B, T).
      inside: int32 (B, T), 1 where a token is of the passage.
      start, end: int32 (B,), first and last token of the answer; both 0 where the window does not hold it.
      weight: fp32 (B,), 0 for rows that only fill the batch.
      number: int32 (B,), which window a row is.
    """

    ids: Any
    mask: Any
    types: Any
    inside: Any
    start: Any
    end: Any
    weight: Any
    number: Any


def span_losses(logits: Float[Array, "B T 2"], batch: Spans) -> Float[Array, " B"]:
    """-(log p(start) + log p(end)) / 2 over the tokens of the passage and the first, which stands for no answer."""
    open_ = (batch.inside != 0) | (jnp.arange(batch.ids.shape[1]) == 0)[None]
    logp = jax.nn.log_softmax(jnp.where(open_[..., None], logits.astype(jnp.float32), -1e9), axis=1)
    places = jnp.stack([batch.start, batch.end], axis=1)[:, None]  # (B, 1, 2)
    return -jnp.mean(jnp.take_along_axis(logp, places, axis=1)[:, 0], axis=-1)


def best_spans(logits: Float[Array, "B T 2"], inside: Int[Array, "B T"]) -> Float[Array, "B 3"]:
    """(first token, last token, score) of the best answer within the passage, of at most 30 tokens.

    The score is its logits less those of no answer, so that windows of one passage can be compared.
    """
    logits = logits.astype(jnp.float32)
    start, end = (jnp.where(inside != 0, logits[..., i], -1e9) for i in (0, 1))
    scores = start[:, :, None] + end[:, None, :]  # (B, T, T)
    places = jnp.arange(inside.shape[1])
    ahead = places[None, :] - places[:, None]
    scores = jnp.where((ahead >= 0) & (ahead < MOST_TOKENS), scores, -2e9)
    best = jnp.argmax(scores.reshape(len(scores), -1), axis=-1)
    score = jnp.max(scores, axis=(1, 2)) - logits[:, 0, 0] - logits[:, 0, 1]
    return jnp.stack([best // len(places), best % len(places), score], axis=-1)


def plain_answer(text: str) -> str:
    """Lower case, without punctuation, English articles and extra spaces (Rajpurkar et al., arXiv 1606.05250)."""
    text = "".join(" " if c in string.punctuation else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(found: str, true: str) -> float:
    """1 where both are the same answer in plain form."""
    return float(plain_answer(found) == plain_answer(true))


def word_f1(found: str, true: str) -> float:
    """Harmonic mean of precision and recall of the words in plain form; of two without words, whether both are so."""
    ours, theirs = (plain_answer(x).split() for x in (found, true))
    if not ours or not theirs:
        return float(ours == theirs)
    both = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * both / (len(ours) + len(theirs))
