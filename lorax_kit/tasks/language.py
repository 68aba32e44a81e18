"""Language modelling: each token from those before it. Of a conversation only what is answered counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.tasks.losses import correct, cross_entropies, next_tokens

if TYPE_CHECKING:
    from jaxtyping import Float


class Told(NamedTuple):
    """A padded batch of texts, and which of their tokens a decoder is to tell.

    Attributes:
      ids: int32 (B, T), 0 where padded.
      mask: int32 (B, T), 1 where a token counts.
      told: int32 (B, T), 1 where a token is to be told from those before it: of the answer, not of the prompt.
    """

    ids: Any
    mask: Any
    told: Any


class Pairs(NamedTuple):
    """A padded batch of texts that are read, and of texts that are written from them.

    Attributes:
      ids, mask: int32 (B, E), what is read, and 1 where a token counts.
      given: int32 (B, T), what is written, after its start: the token before each place.
      label: int32 (B, T), the token to be told at each place.
      weight: int32 (B, T), 1 where a label counts.
    """

    ids: Any
    mask: Any
    given: Any
    label: Any
    weight: Any


def told_batch(ids: Sequence[Any], told: Sequence[Any], size: int, length: int) -> Told:
    """A padded batch of texts and, for each of their tokens, whether it is to be told; cut at the end."""
    batch = Told(*(np.zeros((size, length), np.int32) for _ in range(3)))
    batch.mask[len(ids) :, 0] = 1
    for i, (row, marks) in enumerate(zip(ids, told, strict=True)):
        n = min(len(row), length)
        batch.ids[i, :n], batch.mask[i, :n], batch.told[i, :n] = row[:n], 1, marks[:n]
    return batch


def token_sums(logits: Float[Array, "B T V"], batch: Told) -> tuple[Array, Array, Array]:
    """(sum of losses, number right, number) of the tokens to be told."""
    label, weight = next_tokens(batch.ids, batch.told)
    losses = jnp.sum(cross_entropies(logits, label) * weight)
    return losses, correct(logits, label, weight), jnp.sum(weight)


def row_log_likelihoods(logits: Float[Array, "B T V"], batch: Told) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Of each row, the log-likelihood of its tokens to be told, and how many they are."""
    label, weight = next_tokens(batch.ids, batch.told)
    return -jnp.sum(cross_entropies(logits, label) * weight, axis=1), jnp.sum(weight, axis=1)
