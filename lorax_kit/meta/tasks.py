"""How one task would move the start: MAML, its first-order form, and Reptile. No optimiser here.

theta'   theta after k steps of SGD on the task's support, theta <- theta - rate * grad L_support(theta)
MAML     d L_query(theta') / d theta, through the k steps: second derivatives of the loss (arXiv 1703.03400, eq. 1)
FOMAML   grad L_query at theta': the steps' gradients are held constant (the same, section 5.2)
Reptile  theta - theta', k steps each on other examples of the task (arXiv 1803.02999, algorithm 1)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from lorax_kit.core.leaves import FactorTree
from lorax_kit.core.paths import Params
from lorax_kit.errors import LoraxError
from lorax_kit.meta.inner import adapt_to, check_steps
from lorax_kit.training.objective import losses, means


class Task(NamedTuple):
    """Two batches of one task; with a leading axis in every array, of several tasks.

    Attributes:
      support: the few examples that the inner steps learn from.
      query: others, on which the outcome is measured.
    """

    support: Any
    query: Any


class MetaGradient(NamedTuple):
    """What one task says of the start.

    Attributes:
      loss: float32 (), of the query after the inner steps; Reptile has no query: of the last step's examples before it.
      inner: float32 (steps,), the loss before each inner step.
      factors: the tree by which the start is moved, as a gradient.
      rates: the gradient of `loss` by the inner rates, or None.
    """

    loss: Array
    inner: Array
    factors: FactorTree
    rates: Any


Meta = Callable[[Params, FactorTree, Any, Any], MetaGradient]
"""(base, factors, rates, task) -> MetaGradient."""


def maml(loss_fn: Callable[..., Any], *, steps: int, order: int = 2) -> Meta:
    """The gradient of the query's loss after `steps` inner steps on the support, by the factors before them.

    With adapted functions the second derivatives go through the same factored and merged products as the first: their
    rules, and those of recomputation, are differentiated again, and no full-size gradient of a parameter is formed.

    Args:
      loss_fn: `loss_fn(base, factors, batch)`, as for `lk.make_step`.
      steps: inner steps.
      order: 2, or 1 for FOMAML, which takes the inner gradients as constants: about half the time of a step.

    Returns:
      A function of (base, factors, rates, `Task`), for `meta_step`.

    Raises:
      LoraxError: `steps` below 1, or another order.

    Example:
      >>> import jax.numpy as jnp
      >>> from lorax_kit.core import FullLeaf
      >>> loss = lambda base, f, x: f["w"].value ** 2 * x / 2
      >>> start, rates = {"w": FullLeaf(jnp.float32(1.0))}, {"w": FullLeaf(jnp.float32(0.5))}
      >>> [float(maml(loss, steps=1, order=k)(None, start, rates, Task(1.0, 1.0)).factors["w"].value) for k in (1, 2)]
      [0.5, 0.25]
    """
    check_steps(steps)
    if order not in (1, 2):
        raise LoraxError(f"order is {order!r}; it must be 2 (MAML) or 1 (FOMAML).")
    run = losses(loss_fn, exact=True)

    def gradient(base: Params, factors: FactorTree, rates: Any, task: Task) -> MetaGradient:
        def outcome(factors: FactorTree, rates: Any) -> tuple[Array, Array]:
            own, inner = adapt_to(loss_fn, base, factors, task.support, rates, steps=steps, first_order=order == 1)
            return means(run(own, base, task.query, None), own, 1)[0], inner

        (loss, inner), grads = jax.value_and_grad(outcome, argnums=(0, 1), has_aux=True)(factors, rates)
        return MetaGradient(loss, inner, *grads)

    return gradient


def reptile(loss_fn: Callable[..., Any]) -> Meta:
    """The way back from where the inner steps end to where they began.

    With `optax.sgd(e)` the start moves by e (theta' - theta), the paper's algorithm 1; Adam takes it as a gradient.

    Args:
      loss_fn: `loss_fn(base, factors, batch)`, as for `lk.make_step`.

    Returns:
      A function of (base, factors, rates, batches), for `meta_step`: the arrays of a task's batches lead with an axis
      of inner steps, each of which learns from other examples.

    Example:
      >>> import jax.numpy as jnp
      >>> from lorax_kit.core import FullLeaf
      >>> loss = lambda base, f, x: (f["w"].value - x) ** 2 / 2
      >>> start, rates = {"w": FullLeaf(jnp.float32(0.0))}, {"w": FullLeaf(jnp.float32(0.5))}
      >>> float(reptile(loss)(None, start, rates, jnp.ones(2)).factors["w"].value)
      -0.75
    """

    def gradient(base: Params, factors: FactorTree, rates: Any, batches: Any) -> MetaGradient:
        own, inner = adapt_to(loss_fn, base, factors, batches, rates, steps=None)
        back = jax.tree.map(lambda x, y: x - y, dict(factors), own)
        return MetaGradient(inner[-1], inner, back, None)

    return gradient
