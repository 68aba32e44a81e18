"""Rows of which only what is asked is known, and the answers that a trained model gives: what `predict` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lorax_kit.core.paths import Params
from lorax_kit.data import evaluation_batches, padded

if TYPE_CHECKING:
    from jax import Array


class Asked(NamedTuple):
    """Rows that a task's model is to answer.

    Attributes:
      params: key -> params of the model as it is.
      apply: (params, batch) -> outputs, a row for each of the batch.
      batches: those that evaluation makes of the examples, with the places of the examples in each.
      answers: outputs of every example in order -> an answer for each row in order, as plain data.
      cut: how many examples are longer than a batch.
    """

    params: Callable[[Array], Params]
    apply: Callable[[Params, Any], Any]
    batches: Sequence[tuple[np.ndarray, Any]]
    answers: Callable[[Sequence[np.ndarray]], list[dict[str, Any]]]
    cut: int = 0


class Texts(NamedTuple):
    """A padded batch of texts, int32 (B, T) each."""

    ids: Any
    mask: Any


def placed_batches(
    sizes: Sequence[int] | np.ndarray, make: Callable[[np.ndarray, int, int], Any], **shape: Any
) -> list[tuple[np.ndarray, Any]]:
    """`evaluation_batches`, with the places of each batch's examples."""
    return evaluation_batches(sizes, lambda index, size, length: (index, make(index, size, length)), **shape)


def asked_texts(
    ids: Sequence[Sequence[int]],
    params: Callable[[Array], Params],
    apply: Callable[[Params, Any], Any],
    answer: Callable[[np.ndarray], dict[str, Any]],
    **shape: Any,
) -> Asked:
    """Texts for a model that gives a vector for each.

    Args:
      ids: tokens of each text.
      params, apply: as of `Asked`.
      answer: a text's vector -> what it says.
      shape: batch_size and buckets of `evaluation_batches`.
    """
    sizes = [len(text) for text in ids]

    def make(index: np.ndarray, size: int, length: int) -> Texts:
        return Texts(*padded([ids[i] for i in index], size, length))

    batches = placed_batches(sizes, make, **shape)
    cut = sum(size > max(shape["buckets"]) for size in sizes)
    return Asked(params, apply, batches, lambda outputs: [answer(x) for x in outputs], cut)


def chosen(labels: Sequence[str], logits: np.ndarray) -> dict[str, Any]:
    """The likeliest of several labels, and the probability of each.

    Example:
      >>> chosen(["no", "yes"], np.array([1.0, 1.0]))
      {'label': 'no', 'probability': 0.5, 'probabilities': {'no': 0.5, 'yes': 0.5}}
    """
    shares = np.exp(logits.astype(np.float64) - logits.max())
    shares /= shares.sum()
    best = int(np.argmax(logits))
    named = {label: float(x) for label, x in zip(labels, shares, strict=True)}
    return {"label": labels[best], "probability": named[labels[best]], "probabilities": named}


def chosen_several(labels: Sequence[str], logits: np.ndarray) -> dict[str, Any]:
    """Every label that is likelier than not, and the probability of each.

    Example:
      >>> chosen_several(["a", "b"], np.array([40.0, 0.0]))
      {'labels': ['a'], 'probabilities': {'a': 1.0, 'b': 0.5}}
    """
    shares = 1 / (1 + np.exp(-logits.astype(np.float64)))
    named = {label: float(x) for label, x in zip(labels, shares, strict=True)}
    return {"labels": [label for label, x in zip(labels, logits, strict=True) if x > 0], "probabilities": named}
