"""Classification losses and counts, weighted by example."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def cross_entropies(logits: Float[Array, "B C"], label: Int[Array, " B"]) -> Float[Array, " B"]:
    """-log softmax(logits)[label] of each example, fp32."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(logp, label[:, None], axis=-1)[:, 0]


def cross_entropy(logits: Float[Array, "B C"], label: Int[Array, " B"], weight: Float[Array, " B"]) -> Float[Array, ""]:
    """Weighted mean cross-entropy in nats; 0 if every weight is 0."""
    return jnp.sum(cross_entropies(logits, label) * weight) / jnp.maximum(jnp.sum(weight), 1e-9)


def correct(logits: Float[Array, "B C"], label: Int[Array, " B"], weight: Float[Array, " B"]) -> Float[Array, ""]:
    """Weighted number of examples whose largest logit is their label."""
    return jnp.sum((jnp.argmax(logits, axis=-1) == label).astype(weight.dtype) * weight)
