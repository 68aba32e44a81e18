"""What a base forgets: its own task, held out, before and after an adapter is merged.

    difference = mean_n(after_n - before_n),   error = std_n(after_n - before_n) / sqrt(n)
    KL_n = sum_c p_n(c) (log p_n(c) - log q_n(c)),   p of the base, q of the merged params

Examples are paired, so that what makes one hard cancels: the error of the difference is far below that of either mean.
The KL divergence sees a change of the outputs that the loss does not, and needs no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax import Array

from lorax_kit.core.leaves import FactorTree
from lorax_kit.core.lowrank import dense
from lorax_kit.core.merge import merge
from lorax_kit.core.paths import Params, arrays_only
from lorax_kit.core.plan import Plan
from lorax_kit.core.quantised import Quantised
from lorax_kit.errors import AdapterError

if TYPE_CHECKING:
    from jaxtyping import Float


class Change(NamedTuple):
    """A held-out loss before and after; every example counts alike.

    Attributes:
      before, after: mean losses.
      difference: of the paired losses, after less before: above zero is forgetting.
      error: standard error of the difference; nan for one example.
      divergence: mean KL(before || after) of the outputs, in nats; nan where no logits were given.
      differences: (n,), float64, of each example.
    """

    before: float
    after: float
    difference: float
    error: float
    divergence: float
    differences: Float[np.ndarray, " n"]


def forgetting(
    apply: Callable[[Params, Any], Any],
    losses: Callable[[Any, Any], Array],
    batches: Iterable[Any],
    base: Params,
    factors: FactorTree,
    plan: Plan,
    *,
    logits: Callable[[Any], Array] | None = None,
    weight: Callable[[Any], Any] | None = None,
) -> Change:
    """Measure what merging an adapter does to a held-out task of the base.

    Args:
      apply: `apply(params, batch) -> outputs`, traceable by JAX.
      losses: `losses(outputs, batch) -> (n, *positions)`, one loss an example, or one a position, as of tokens. Any
        metric that is a mean over examples: 0 or 1 for an error.
      batches: of the held-out task; a program is compiled for each shape.
      base: the params that were split, quantised or not.
      factors: the tree that `lk.split` returns, trained.
      plan: from `lk.resolve`.
      logits: `logits(outputs) -> (n, *positions, classes)`, for the KL divergence; None: not measured.
      weight: `weight(batch) -> (n, *positions)`, how much each position counts within its example; an example of
        weight 0 is padding. None: all count alike.

    Returns:
      A `Change`, summed on the host in float64.

    Raises:
      AdapterError: no examples; losses, logits or weights whose shapes do not agree; factors that do not fit the plan.
      PlanError: a base that does not fit the plan.

    Example:
      >>> import jax.numpy as jnp
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.eye(3)}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1, alpha=1, inputs=(0,))}), params)
      >>> factors = {"w": lk.Factors(a=jnp.ones((1, 3)), b=jnp.array([[1.0, 0.0, 0.0]]))}
      >>> x = jnp.eye(3)[None, 1:]
      >>> apply, losses = lambda p, x: x @ p["w"], lambda y, x: jnp.sum((y - x) ** 2, axis=-1)
      >>> found = forgetting(apply, losses, x, params, factors, plan)
      >>> found.before, found.after, found.error
      (0.0, 1.0, 0.0)
    """
    after = merge(base, factors, plan)
    return held_out_change(apply, losses, batches, base, after, logits=logits, weight=weight)


def held_out_change(
    apply: Callable[[Params, Any], Any],
    losses: Callable[[Any, Any], Array],
    batches: Iterable[Any],
    before: Params,
    after: Params,
    *,
    logits: Callable[[Any], Array] | None = None,
    weight: Callable[[Any], Any] | None = None,
) -> Change:
    """Compare two versions of one model on held-out batches: `forgetting`, of any params.

    Args:
      before, after: params of one structure, such as the base and an arm of `scale_intruders`.
      apply, losses, batches, logits, weight: as in `forgetting`.

    Raises:
      AdapterError: no examples; losses, logits or weights whose shapes do not agree.
    """
    arrays, whole = arrays_only(before)
    old = {path: dense(x) if isinstance(x, Quantised) else x for path, x in arrays.items()}
    new = {path: dense(x) if isinstance(x, Quantised) else x for path, x in arrays_only(after)[0].items()}

    @jax.jit
    def measured(arrays: Any, batch: Any) -> tuple[Array, Any]:
        outputs = apply(whole(arrays), batch)
        return losses(outputs, batch), None if logits is None else logits(outputs)

    parts: list[np.ndarray] = []
    for batch in batches:
        (loss, one), (other_loss, other) = measured(old, batch), measured(new, batch)
        values = [np.asarray(x, np.float64) for x in (loss, other_loss)]
        if one is not None:
            values.append(_divergences(one, other, values[0].shape))
        parts.append(_per_example(values, None if weight is None else np.asarray(weight(batch), np.float64)))
    n = sum(x.shape[1] for x in parts)
    if n == 0:
        raise AdapterError("there are no held-out examples: no batches, or weights of 0 alone.")
    one_loss, two_loss, *rest = np.concatenate(parts, axis=1)
    differences = two_loss - one_loss
    return Change(
        before=float(one_loss.mean()),
        after=float(two_loss.mean()),
        difference=float(differences.mean()),
        error=float(differences.std(ddof=1) / n**0.5) if n > 1 else float("nan"),
        divergence=float(rest[0].mean()) if rest else float("nan"),
        differences=differences,
    )


def _divergences(one: Any, other: Any, shape: tuple[int, ...]) -> np.ndarray:
    """KL of softmax(one) from softmax(other) over the last axis."""
    if one.shape[:-1] != shape:
        raise AdapterError(
            f"logits of shape {one.shape} do not go with losses of shape {shape}.\n"
            "  they must be the losses' axes and one of classes"
        )
    p, q = (_log_softmax(np.asarray(x, np.float64)) for x in (one, other))
    there = np.isfinite(p)  # a class of probability zero, logit -inf, adds nothing
    kl: np.ndarray = np.sum(np.exp(p) * (np.where(there, p, 0) - np.where(there, q, 0)), axis=-1)
    return kl


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    shifted: np.ndarray = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return shifted


def _per_example(values: list[np.ndarray], weight: np.ndarray | None) -> np.ndarray:
    """(len(values), n): the weighted means over positions of the examples that count."""
    shape = values[0].shape
    weight = np.ones(shape) if weight is None else weight
    if not shape or weight.shape != shape:
        raise AdapterError(
            f"losses of shape {shape} and weights of shape {weight.shape}: both must be (examples, *positions).\n"
            "  return one loss an example, not their mean"
        )
    weight = weight.reshape(shape[0], -1)
    total = weight.sum(axis=1)
    flat = np.stack([x.reshape(weight.shape) for x in values])
    # What padding holds does not matter, nan or not.
    sums = np.sum(np.where(weight > 0, flat, 0) * weight, axis=2)
    means: np.ndarray = sums[:, total > 0] / total[total > 0]
    return means
