"""LoRA+: B learns at a multiple of A's rate, lr_B = ratio lr_A (Hayou et al., arXiv 2402.12354, section 4)."""

from __future__ import annotations

import optax
from jax import Array

from lorax_kit.core.leaves import FactorTree
from lorax_kit.core.method import method_of, trained_leaves
from lorax_kit.core.plan import Plan
from lorax_kit.core.specs.setting import is_number
from lorax_kit.errors import PlanError


def lora_plus(
    tx: optax.GradientTransformation, plan: Plan, *, ratio: float | Array = 16.0
) -> optax.GradientTransformationExtraArgs:
    """Give the leaves on the side of the outputs `ratio` times the rate: LoRA's `b`, VeRA's `v`, LoHa's `b1` and `b2`.

    Their updates are scaled: with SGD, Adam, AdamW and every other optimiser whose updates are proportional to its
    rate that is another rate, with the same schedule. For others give `lk.partition` a mapping. Lookups keep one rate:
    there `b` is drawn, and the zero factor is `a`.

    Args:
      tx: the optimiser, at the rate of `a` and of everything else.
      plan: from `lk.resolve`.
      ratio: lr_B / lr_A, which may be traced; the paper finds 2^4 best for RoBERTa on GLUE.

    Returns:
      An `optax.GradientTransformation` over the factor tree, for `lk.partition`.

    Raises:
      PlanError: a ratio that is not positive, or a plan that trains no such leaf.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), params)
      >>> base, factors = lk.split(params, plan, jax.random.key(0))
      >>> tx = lk.partition(lora_plus(optax.sgd(0.5), plan, ratio=16), plan)
      >>> ones = jax.tree.map(jnp.ones_like, factors)
      >>> updates, _ = tx.update(ones, tx.init(factors), factors)
      >>> float(updates["w"].a[0, 0]), float(updates["w"].b[0, 0])
      (-0.5, -8.0)
    """
    if not isinstance(ratio, Array) and not (is_number(ratio) and ratio > 0):
        raise PlanError(f"ratio is {ratio!r}; it must be a positive number.")
    faster = {
        site.path: [name for name in trained_leaves(site) if name in method_of(site.setting).outputs]
        for site in plan.sites
        if not site.lookup
    }
    if not any(faster.values()):
        raise PlanError("the plan trains no leaf on the side of the outputs, such as LoRA's b: LoRA+ changes nothing.")

    def scaled(updates: FactorTree, _: FactorTree | None = None) -> FactorTree:
        out = dict(updates)
        for path, names in faster.items():
            leaves = {name: getattr(updates[path], name) for name in names}
            mine = {k: x for k, x in leaves.items() if not isinstance(x, optax.MaskedNode)}
            out[path] = updates[path]._replace(**{k: (ratio * x).astype(x.dtype) for k, x in mine.items()})
        return out

    return optax.chain(tx, optax.stateless(scaled))
