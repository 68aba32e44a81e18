"""Ranks by site: a budget goes to the directions that count the most, wherever they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from lorax_kit.core.method import max_rank
from lorax_kit.core.plan import Plan, plan_of_sites
from lorax_kit.core.specs.setting import is_int, is_number, shown
from lorax_kit.errors import PlanError, SpecError

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import ArrayLike


def spend_ranks(
    plan: Plan, values: Mapping[str, Float[ArrayLike, " k"]], *, budget: int | None = None, rho: float = 2.0
) -> Plan:
    """Give each next rank to the site whose next direction has the largest value, until a budget is spent.

    With the squared singular values of the gradients of the full weights (`lorax_kit.analysis.gradient_spectra`) the
    ranks follow as much of the gradients as so many ranks can; with the shares of the inputs' directions they are EVA's
    (`lk.starts.eva_ranks`). The scale of every site that has an alpha stays: alpha changes with the rank.

    Args:
      plan: from `lk.resolve`.
      values: site -> what its first direction, its second and so on count for, falling; other sites stay as they are.
      budget: sum of the ranks over all matrices, a stack of S matrices counting S times; None: what the plan spends on
        these sites.
      rho: no site gets more than `rho` times its own rank, rounded as PEFT does, or than it can hold.

    Returns:
      A plan whose spec has one rule per path. A site that gets no rank is not in it.

    Raises:
      PlanError: a path that is no site, a method without a rank, values that are no falling numbers, a budget or rho
        out of range.

    Example:
      >>> import jax.numpy as jnp, lorax_kit as lk
      >>> params, fn = {"u": jnp.eye(4), "v": jnp.eye(4)}, lambda p, x: x @ p["u"] @ p["v"]
      >>> plan = lk.resolve(lk.Spec({"*": lk.LoRA(rank=2)}), params, fn, jnp.ones((1, 4)))
      >>> {site.path: site.rank for site in spend_ranks(plan, {"u": [9, 3, 3, 3], "v": [4, 0, 0, 0]}).sites}
      {'u': 3, 'v': 1}
    """
    sites = {site.path: site for site in plan.sites}
    if not values or set(values) - set(sites):
        missing = sorted(set(values) - set(sites))
        raise PlanError(f"values are of {missing or 'no path'}; the sites are {', '.join(sites)}.")
    if not is_number(rho) or not 1 <= rho < float("inf"):
        raise PlanError(f"rho is {shown(rho)}; it must be a number of at least 1.")
    if budget is not None and (not is_int(budget) or budget < 1):
        raise PlanError(f"budget is {shown(budget)}; it must be an integer of at least 1.")
    prices = {path: prod(sites[path].stack_shape) for path in values}
    steps: list[tuple[float, str]] = []
    for path, own in values.items():
        site, falling = sites[path], np.asarray(own, np.float64)
        if getattr(site.setting, "rank", None) is None:
            raise PlanError(f"{site.setting.kind} at {path!r} has no rank to give out.")
        if falling.ndim != 1 or not np.all(falling >= 0) or not np.all(falling[1:] <= falling[:-1] * (1 + 1e-6)):
            raise PlanError(f"the values of {path!r} must be a list of numbers of at least 0, falling.")
        steps += [(float(x), path) for x in falling[: min(round(rho * site.rank), max_rank(site))]]
    left = sum(sites[path].rank * price for path, price in prices.items()) if budget is None else budget
    ranks = dict.fromkeys(prices, 0)
    for _, path in sorted(steps, key=lambda step: -step[0]):
        if prices[path] <= left:
            ranks[path] += 1
            left -= prices[path]
    if not any(ranks.values()):
        raise PlanError(f"budget is {budget}, less than the {min(prices.values())} matrices of the smallest stack.")
    try:
        kept = tuple(
            replace(site, setting=site.setting.of_rank(ranks[site.path])) if site.path in ranks else site  # type: ignore[attr-defined]
            for site in plan.sites
            if ranks.get(site.path) != 0
        )
    except SpecError as e:  # such as an odd rank of HRA
        raise PlanError(f"the ranks that the values come to do not fit the method: {e}") from None
    return plan_of_sites(kept, plan.full, plan.compute_dtype)
