"""Classes and numbers as answers: losses, the sums that add up over batches, and the metrics made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.tasks.losses import correct, cross_entropies

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def one_class_sums(
    logits: Float[Array, "B C"], label: Int[Array, " B"], weight: Float[Array, " B"]
) -> dict[str, Array]:
    """Sums of a classifier: loss, correct, and by class how often it is true, given, and both."""
    classes = logits.shape[-1]
    true = jax.nn.one_hot(label, classes) * weight[:, None]
    given = jax.nn.one_hot(jnp.argmax(logits, axis=-1), classes) * weight[:, None]
    return {
        "loss": jnp.sum(cross_entropies(logits, label) * weight),
        "correct": correct(logits, label, weight),
        "true": jnp.sum(true, axis=0),
        "given": jnp.sum(given, axis=0),
        "both": jnp.sum(jnp.minimum(true, given), axis=0),
        "weight": jnp.sum(weight),
    }


def several_classes_sums(
    logits: Float[Array, "B C"], label: Float[Array, "B C"], weight: Float[Array, " B"]
) -> dict[str, Array]:
    """Sums where an example may have any number of classes: a class is given where its logit is above 0.

    The loss is the binary cross-entropy, a mean over the classes; correct is an example all of whose classes are right.
    """
    losses = jnp.mean(jax.nn.softplus(logits) - logits * label, axis=-1)
    given = (logits > 0).astype(jnp.float32)
    right = jnp.all(given == label, axis=-1).astype(jnp.float32)
    return {
        "loss": jnp.sum(losses * weight),
        "correct": jnp.sum(right * weight),
        "true": jnp.sum(label * weight[:, None], axis=0),
        "given": jnp.sum(given * weight[:, None], axis=0),
        "both": jnp.sum(given * label * weight[:, None], axis=0),
        "weight": jnp.sum(weight),
    }


def number_sums(found: Float[Array, " B"], label: Float[Array, " B"], weight: Float[Array, " B"]) -> dict[str, Array]:
    """Sums of a regression: the loss is the squared error, beside it the absolute one."""
    error = found - label
    sums = {"loss": error**2, "absolute_error": jnp.abs(error)}
    return {name: jnp.sum(x * weight) for name, x in sums.items()} | {"weight": jnp.sum(weight)}


def macro_f1(mean: Mapping[str, Any]) -> float:
    """The mean over the classes of 2 both / (true + given); a class that is neither true nor given is left out."""
    total = np.asarray(mean["true"]) + np.asarray(mean["given"])
    there = total > 0
    return float(np.mean(2 * np.asarray(mean["both"])[there] / total[there])) if there.any() else 0.0


def micro_f1(mean: Mapping[str, Any]) -> float:
    """2 both / (true + given) over all classes together; 0 where none is true or given."""
    total = float(np.sum(mean["true"]) + np.sum(mean["given"]))
    return 2 * float(np.sum(mean["both"])) / total if total else 0.0


def pearson(found: np.ndarray, true: np.ndarray) -> float:
    """Correlation of what is found with what is true, (n,) each, in float64; NaN where either does not vary.

    Means are taken away before anything is squared: of sums of squares nothing is left where numbers lie closely
    together.
    """
    if np.ptp(found) == 0 or np.ptp(true) == 0:
        return float("nan")
    x, y = (np.asarray(z, np.float64) - np.mean(z, dtype=np.float64) for z in (found, true))
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
