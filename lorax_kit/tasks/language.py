"""Language modelling: each token from those before it. Of a conversation only what is answered counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.tasks.losses import correct, cross_entropies, next_tokens

if TYPE_CHECKING:
    from jaxtyping import Float


LOGITS_AT_ONCE = 2**24
"""Logits (places times words) that are held at once, and once more as gradients: 64 MiB in fp32."""


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


def token_sums_in_pieces(
    logits_of: Callable[[Float[Array, "1 P D"]], Float[Array, "1 P V"]],
    hidden: Float[Array, "B T D"],
    batch: Told,
    *,
    at_once: int = LOGITS_AT_ONCE,
) -> tuple[Array, Array, Array]:
    """`token_sums(logits_of(hidden), batch)` to rounding, from a few places at a time: the logits are never held whole.

    The backward pass forms each piece's logits once more: a batch of 8 x 256 tokens and 49,152 words keeps 9 MB of
    hidden states in place of 403 MB of logits, and has 50 MB of gradients at a time. Few logits are formed whole.

    Args:
      logits_of: hidden states -> logits, place by place.
      at_once: the most logits of a piece.

    Returns:
      fp32 scalars: sum of losses, number right, number.

    Example:
      >>> table, hidden = jnp.eye(3, 5), jnp.ones((2, 4, 3))
      >>> batch = told_batch([[0, 1, 2, 3], [4, 0, 1]], [[1] * 4, [1] * 3], 2, 4)
      >>> losses, right, count = token_sums_in_pieces(lambda x: x @ table, hidden, batch, at_once=10)
      >>> whole, _, _ = token_sums(hidden @ table, batch)
      >>> float(count), abs(float(losses - whole)) < 1e-5
      (5.0, True)
    """
    places = hidden.shape[0] * hidden.shape[1]
    words = jax.eval_shape(logits_of, jax.ShapeDtypeStruct((1, 1, hidden.shape[2]), hidden.dtype)).shape[-1]
    if places * words <= at_once:
        return token_sums(logits_of(hidden), batch)
    label, weight = next_tokens(batch.ids, batch.told)
    least = -(-places // max(at_once // words, 1))
    pieces = next((n for n in range(least, 2 * least) if places % n == 0), least)
    size = -(-places // pieces)

    def cut(x: Array) -> Array:
        flat = x.reshape(places, *x.shape[2:])
        filled = jnp.pad(flat, [(0, pieces * size - places), *((0, 0) for _ in flat.shape[1:])])
        return filled.reshape(pieces, 1, size, *x.shape[2:])

    @jax.checkpoint
    def add(total: tuple[Array, Array], piece: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        x, label, weight = piece
        logits = logits_of(x)
        losses, right = jnp.sum(cross_entropies(logits, label) * weight), correct(logits, label, weight)
        return (total[0] + losses, total[1] + right), None

    zero = jnp.zeros((), jnp.float32)
    (losses, right), _ = jax.lax.scan(add, (zero, zero), (cut(hidden), cut(label), cut(weight)))
    return losses, right, jnp.sum(weight)
