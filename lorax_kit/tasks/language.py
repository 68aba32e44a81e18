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


def told_batch(ids: Sequence[Any], starts: Sequence[int], size: int, length: int) -> Told:
    """A batch of texts whose tokens from `starts` on are to be told; longer texts are cut at the end."""
    rows, mask, told = (np.zeros((size, length), np.int32) for _ in range(3))
    mask[len(ids) :, 0] = 1
    for i, (row, start) in enumerate(zip(ids, starts, strict=True)):
        n = min(len(row), length)
        rows[i, :n] = row[:n]
        mask[i, :n] = 1
        told[i, start:n] = 1
    return Told(rows, mask, told)


def token_sums(logits: Float[Array, "B T V"], batch: Told) -> tuple[Array, Array, Array]:
    """(sum of losses, number right, number) of the tokens to be told."""
    label, weight = next_tokens(batch.ids, batch.told)
    losses = jnp.sum(cross_entropies(logits, label) * weight)
    return losses, correct(logits, label, weight), jnp.sum(weight)


def row_log_likelihoods(logits: Float[Array, "B T V"], batch: Told) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Of each row, the log-likelihood of its tokens to be told, and how many they are."""
    label, weight = next_tokens(batch.ids, batch.told)
    return -jnp.sum(cross_entropies(logits, label) * weight, axis=1), jnp.sum(weight, axis=1)
