"""The inner steps: plain SGD on a task's few examples, from factors that all tasks start with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.core.leaves import FactorTree, check_factors
from lorax_kit.core.paths import Params, is_array
from lorax_kit.core.plan import Plan
from lorax_kit.core.specs.setting import is_int, is_number, plain, shown
from lorax_kit.errors import LoraxError
from lorax_kit.training import labels
from lorax_kit.training.objective import gradients, losses, means


def inner_rates(plan: Plan, factors: FactorTree, rate: float | Array | Mapping[str, float | Array]) -> dict[str, Any]:
    """The rate of the inner steps at every leaf.

    Args:
      plan: from `lk.resolve`.
      factors: the tree that `lk.split` returns.
      rate: one for everything trained, or one per label as in `lk.partition`: the names of the leaves ("a", "b", ...)
        and "full". It may be traced, so that one program serves many.

    Returns:
      The tree of the factors with a float32 () in the place of each trained leaf, and None in that of a frozen one.

    Raises:
      LoraxError: a rate that is negative or not finite, a label that the plan needs and that has no rate, or one that
        it does not know.
      AdapterError: factors that do not fit the plan.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), params)
      >>> rates = inner_rates(plan, lk.split(params, plan, jax.random.key(0))[1], {"a": 0.0, "b": 0.5})
      >>> float(rates["w"].a), float(rates["w"].b)
      (0.0, 0.5)
    """
    check_factors(plan, factors)
    named = labels(plan)(dict(factors))
    needed = sorted({label for label in jax.tree.leaves(named) if label != "frozen"})
    by_label = dict(rate) if isinstance(rate, Mapping) else dict.fromkeys(needed, rate)
    for word, names in (("lack", set(needed) - set(by_label)), ("name the unknown", set(by_label) - set(needed))):
        if names:
            raise LoraxError(f"the inner rates {word} label {min(names)!r}: the plan trains {', '.join(needed)}.")
    given = {label: _checked(label, one) for label, one in by_label.items()}
    return {
        path: leaves._replace(**{k: given.get(label) for k, label in named[path]._asdict().items()})
        for path, leaves in factors.items()
    }


def _checked(label: str, rate: Any) -> Array:
    number = plain(rate)
    if is_array(number) and jnp.ndim(number) == 0 and jnp.issubdtype(number.dtype, jnp.floating):
        return jnp.asarray(number, jnp.float32)
    if not is_number(number) or number < 0:
        raise LoraxError(f"the inner rate of {label!r} is {shown(number)}; it must be a number of at least 0.")
    return jnp.asarray(number, jnp.float32)


def adapt_to(
    loss_fn: Callable[..., Any],
    base: Params,
    factors: FactorTree,
    batch: Any,
    rates: Any,
    *,
    steps: int | None,
    first_order: bool = False,
) -> tuple[FactorTree, Array]:
    """Take a few steps of SGD: factors <- factors - rate * gradient.

    A pure function: under `jit` one program serves all tasks of the same shapes; under `vmap` over the batch (and
    `lk.adapt(..., trials=TASKS)`) it adapts to many tasks at once.

    Args:
      loss_fn: `loss_fn(base, factors, batch)`, as for `lk.make_step`.
      base: the frozen params.
      factors: where the steps start.
      batch: the task's examples, the same in each step; if `steps` is None, its arrays lead with an axis of steps.
      rates: from `inner_rates`.
      steps: how many, at least 1; None: as many as the batch has.
      first_order: hold the gradients constant when the result is differentiated.

    Returns:
      The task's own factors, and the loss before each step, float32 (steps,).

    Raises:
      LoraxError: `steps` is not an integer of at least 1; rates of another tree than the factors.

    Example:
      >>> from lorax_kit.core import FullLeaf
      >>> loss = lambda base, f, x: (f["w"].value - x) ** 2
      >>> own, losses = adapt_to(loss, None, {"w": FullLeaf(0.0)}, 1.0, {"w": FullLeaf(jnp.float32(0.25))}, steps=2)
      >>> float(own["w"].value), losses.tolist()
      (0.75, [1.0, 0.25])
    """
    if steps is not None:
        check_steps(steps)
    check_rates(factors, rates)
    run = gradients(losses(loss_fn, exact=True))

    def one(now: Any, batch: Any) -> tuple[Any, Array]:
        value, _, grads = means(run(now, base, batch, None), now, 1)
        grads = jax.lax.stop_gradient(grads) if first_order else grads
        return jax.tree.map(_stepped, rates, now, grads, is_leaf=_absent), value

    start = jax.tree.map(jnp.asarray, dict(factors))
    if steps is None:
        return jax.lax.scan(one, start, batch)
    return jax.lax.scan(lambda now, _: one(now, batch), start, None, length=steps)


def _stepped(rate: Array | None, x: Any, grad: Any) -> Any:
    return x if rate is None else x - jnp.asarray(rate, x.dtype) * grad


def _absent(x: Any) -> bool:
    return x is None


def check_steps(steps: Any) -> None:
    """Raise `LoraxError` unless `steps` is an integer of at least 1."""
    if not is_int(plain(steps)) or steps < 1:
        raise LoraxError(f"the number of inner steps is {shown(steps)}; it must be an integer of at least 1.")


def check_rates(factors: Any, rates: Any) -> None:
    """Raise `LoraxError` unless `rates` has a number or None for each leaf of the factors."""
    try:
        fits = jax.tree.map(_one_rate, rates, dict(factors), is_leaf=_absent)
        ok = all(jax.tree.leaves(fits))
    except (TypeError, ValueError):
        ok = False
    if not ok:
        raise LoraxError(
            "the inner rates do not hold one number for each leaf of the factors.\n"
            "  rates = meta.inner_rates(plan, factors, 0.1)"
        )


def _one_rate(rate: Any, x: Any) -> bool:
    """Whether a number, or None, meets one leaf, and no branch of factors."""
    return (rate is None or jnp.ndim(rate) == 0) and jax.tree_util.treedef_is_leaf(jax.tree.structure(x))
