"""AdaLoRA's budget: which triplets of a plan stay, by their importance (Zhang et al., arXiv 2303.10512).

At step t the b(t) most important triplets of all sites together keep their e; the e of the others becomes zero:

    I = |w dL/dw|,   I' = beta1 I' + (1 - beta1) I,   U = beta2 U + (1 - beta2) |I - I'|,   s = I' U     eqs. 8-11
    S_i = s(e_i) + mean over inputs of s(A_i) + mean over outputs of s(B_i)                               eq. 7
    b(t) = b_T + (b_0 - b_T) (1 - (t - warmup) / (total - final - warmup))^3                              eq. 12

b_0 before that, b_T in the last `final` steps. The paper prints t - warmup - final, which would jump; this is PEFT's,
and continuous. While b(t) falls, a triplet whose e became zero is still trained and can come back; at step
total - final the choice becomes the mask, and holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lorax_kit.arrays.dtypes import wide
from lorax_kit.core.leaves import FactorTree
from lorax_kit.core.plan import Plan
from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import is_int, is_number
from lorax_kit.errors import PlanError

KIND, TRIPLET = "adalora", ("a", "e", "b")


class BudgetState(NamedTuple):
    """State of `adalora_budget`.

    Attributes:
      inner: state of the optimiser within.
      step: int32 (), steps taken.
      sensitivity, uncertainty: path -> leaf -> the smoothed I' and U of its entries, at least fp32.
    """

    inner: Any
    step: Array
    sensitivity: Mapping[str, Mapping[str, Array]]
    uncertainty: Mapping[str, Mapping[str, Array]]


def adalora_budget(
    tx: optax.GradientTransformation,
    plan: Plan,
    target_rank: float | Array,
    warmup: int,
    final: int,
    total: int,
    *,
    interval: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """An optimiser that also shares out the triplets of AdaLoRA's sites.

    Args:
      tx: what trains the factors, from `lk.partition`.
      plan: from `lk.resolve`; its sites of other methods are left alone.
      target_rank: triplets that stay, a mean over the matrices that are adapted (a stacked parameter has several); it
        may be traced.
      warmup: steps before triplets are taken away.
      final: steps at the end that train those that are left.
      total: all steps.
      interval: steps between choices; in between, triplets that were taken away are trained.
      beta1, beta2: how slowly sensitivities and uncertainties forget.

    Returns:
      An `optax.GradientTransformation` over the factor tree, for `lk.make_step`. The only one that moves `mask`; after
      step `total - final` it holds the ones of b_T triplets, and never changes again. Triplets that are zero when it is
      made, as those above the rank of a stacked trial, are not counted.

    Raises:
      PlanError: no site is AdaLoRA's, or an argument is out of range.

    Example:
      >>> import lorax_kit as lk
      >>> plan = lk.resolve(lk.Spec({"w": lk.AdaLoRA(rank=3)}), {"w": jnp.ones((5, 4))})
      >>> tx = adalora_budget(lk.partition(optax.adam(1e-3), plan), plan, 2, warmup=10, final=20, total=100)
    """
    sites = tuple(site for site in plan.sites if site.setting.kind == KIND)
    if not sites:
        kinds = ", ".join(sorted({site.setting.kind for site in plan.sites})) or "none"
        raise PlanError(f"the plan has no site of lk.AdaLoRA for a budget; its methods: {kinds}.")
    _check(target_rank, max(site.rank for site in sites), warmup, final, total, interval, (beta1, beta2))
    inner, hold = optax.with_extra_args_support(tx), total - final

    def init(factors: FactorTree) -> BudgetState:
        if any(isinstance(getattr(factors[s.path], k), optax.MaskedNode) for s in sites for k in (*TRIPLET, "mask")):
            raise PlanError(
                "a partition hides factors from adalora_budget, which goes around it.\n"
                "  lk.adalora_budget(lk.partition(tx, plan), plan, ...)"
            )

        def zeros() -> dict[str, dict[str, Array]]:
            leaves = {s.path: {k: getattr(factors[s.path], k) for k in TRIPLET} for s in sites}
            return jax.tree.map(lambda x: jnp.zeros_like(x, wide(x.dtype)), leaves)

        return BudgetState(inner.init(factors), jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(grads: Any, state: BudgetState, params: Any = None, **extra: Any) -> tuple[Any, BudgetState]:
        updates, inner_state = inner.update(grads, state.inner, params, **extra)
        step = state.step + 1
        sensitivity: dict[str, dict[str, Array]] = {}
        uncertainty: dict[str, dict[str, Array]] = {}
        for s in sites:
            sensitivity[s.path], uncertainty[s.path] = {}, {}
            for k in TRIPLET:
                old, doubt = state.sensitivity[s.path][k], state.uncertainty[s.path][k]
                now = jnp.abs(getattr(params[s.path], k) * getattr(grads[s.path], k)).astype(old.dtype)
                smooth = beta1 * old + (1 - beta1) * now
                sensitivity[s.path][k] = smooth
                uncertainty[s.path][k] = beta2 * doubt + (1 - beta2) * jnp.abs(now - smooth)
        masks = [params[s.path].mask for s in sites]
        scores = [_score(s, sensitivity[s.path], uncertainty[s.path]) for s in sites]
        chosen = _most_important(scores, masks, _budget(masks, target_rank, step, warmup, hold))
        choosing = (step > warmup) & (step % interval == 0)
        updates = dict(updates)
        for s, mask, keep in zip(sites, masks, chosen, strict=True):
            mask_after = jnp.where(step == hold, keep, mask)
            keep = jnp.where(step >= hold, mask_after, jnp.where(choosing, keep, 1))
            moved, e = updates[s.path], params[s.path].e
            updates[s.path] = moved._replace(mask=mask_after - mask, e=jnp.where(keep > 0, moved.e, -e))
        return updates, BudgetState(inner_state, step, sensitivity, uncertainty)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(
    target_rank: Any, rank: int, warmup: Any, final: Any, total: Any, interval: Any, betas: tuple[Any, Any]
) -> None:
    traced = isinstance(target_rank, Array)
    problems = {
        f"target_rank is {target_rank!r}; it must be a positive number, at most the rank {rank} of the sites.": not (
            traced or (is_number(target_rank) and 0 < target_rank <= rank)
        ),
        f"interval is {interval!r}; it must be an integer of at least 1.": not (is_int(interval) and interval >= 1),
    }
    for name, x in (("warmup", warmup), ("final", final), ("total", total)):
        problems[f"{name} is {x!r}; it must be an integer of at least 0."] = not (is_int(x) and x >= 0)
    for name, x in zip(("beta1", "beta2"), betas, strict=True):
        problems[f"{name} is {x!r}; it must lie in [0, 1)."] = not (is_number(x) and 0 <= x < 1)
    for message, wrong in problems.items():
        if wrong:
            raise PlanError(message)
    if warmup + final >= total:
        raise PlanError(
            f"warmup {warmup} and final {final} leave none of {total} steps to share out the budget.\n"
            "  give warmup + final < total"
        )


def _score(site: Site, sensitivity: Mapping[str, Array], uncertainty: Mapping[str, Array]) -> Array:
    """S of every triplet of a site, (rank, *stack)."""
    a, e, b = (sensitivity[k] * uncertainty[k] for k in TRIPLET)
    return e + sum(jnp.mean(x, axis=tuple(range(e.ndim, x.ndim))) for x in (a, b))


def _budget(masks: list[Array], target_rank: Any, step: Array, warmup: int, hold: int) -> Array:
    """b(t), fp32 (): from all triplets that are there to `target_rank` for each matrix that has any."""
    first = sum(jnp.sum(mask.astype(jnp.float32)) for mask in masks)
    matrices = sum(jnp.sum(jnp.any(mask > 0, axis=0).astype(jnp.float32)) for mask in masks)
    last = jnp.minimum(jnp.asarray(target_rank, jnp.float32) * matrices, first)
    done = jnp.clip((step.astype(jnp.float32) - warmup) / (hold - warmup), 0, 1)
    return last + (first - last) * (1 - done) ** 3


def _most_important(scores: list[Array], masks: list[Array], budget: Array) -> list[Array]:
    """For every site 1 where a triplet is among the `budget` best of all that are there, in the dtype of its mask."""
    flat = jnp.concatenate([jnp.where(m > 0, s, -1).ravel() for s, m in zip(scores, masks, strict=True)])
    place = jnp.argsort(jnp.argsort(-flat, stable=True))
    keep = place < jnp.floor(budget + 1e-3)  # a budget that is whole may come out a little below
    out, start = [], 0
    for mask in masks:
        out.append((keep[start : start + mask.size].reshape(mask.shape) & (mask > 0)).astype(mask.dtype))
        start += mask.size
    return out
