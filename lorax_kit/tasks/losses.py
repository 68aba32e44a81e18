"""Classification losses and counts, weighted by example (or by token: any leading axes)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def cross_entropies(logits: Float[Array, "*B C"], label: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """-log softmax(logits)[label] of each example, fp32."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(logp, label[..., None], axis=-1)[..., 0]


def cross_entropy(
    logits: Float[Array, "*B C"], label: Int[Array, "*B"], weight: Float[Array, "*B"]
) -> Float[Array, ""]:
    """Weighted mean cross-entropy in nats; 0 if every weight is 0."""
    return jnp.sum(cross_entropies(logits, label) * weight) / jnp.maximum(jnp.sum(weight), 1e-9)


def correct(logits: Float[Array, "*B C"], label: Int[Array, "*B"], weight: Float[Array, "*B"]) -> Float[Array, ""]:
    """Weighted number of examples whose largest logit is their label."""
    return jnp.sum((jnp.argmax(logits, axis=-1) == label).astype(weight.dtype) * weight)


def next_tokens(ids: Int[Array, "B T"], mask: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """Labels and weights of logits (B, T, V): each place is to tell the token after it; the last has none."""
    label = jnp.concatenate([ids[:, 1:], ids[:, :1]], axis=1)
    last = jnp.arange(ids.shape[1]) == ids.shape[1] - 1
    counted = jnp.concatenate([mask[:, 1:], mask[:, :1]], axis=1) != 0
    return label, jnp.where(last[None], False, counted).astype(jnp.float32)
