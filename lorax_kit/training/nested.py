"""One training that serves every rank: the first r rows of an adapter are trained to be the rank-r adapter.

At each step a rank r is drawn, and the loss is that of the first r rows of every factor alone. The first rows learn
what helps most, and cutting the adapter off after r rows needs no decomposition (DyLoRA, Valipour et al., arXiv
2210.07558).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.core.leaves import FactorTree, keep_rows
from lorax_kit.core.method import leaf_shapes, method_of
from lorax_kit.core.plan import Plan, plan_of_sites
from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import is_int, shown
from lorax_kit.errors import PlanError, SpecError


def nested(loss_fn: Callable[..., Any], plan: Plan, ranks: Sequence[int]) -> Callable[..., Any]:
    """Make a loss train the first r rows of an adapter for every r of `ranks`, one of them drawn at each step.

    Args:
      loss_fn: (base, factors, batch, key) -> loss, or (loss, aux), as for `lk.make_step`; it gets a key of its own.
      plan: of the factors, at the highest rank.
      ranks: those to serve, each from 1 to the rank of every site.

    Returns:
      A loss of the same form. It needs a key: `init(factors, key)`.

    Raises:
      PlanError: no ranks, one above a site's, a method without rows.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), params, lambda p, x: x @ p["w"], jnp.ones((5, 4)))
      >>> loss = nested(lambda base, factors, batch, key: jnp.sum(factors["w"].a ** 2), plan, [1, 2])
      >>> base, factors = lk.split(params, plan, jax.random.key(0))
      >>> bool(loss(base, factors, None, jax.random.key(1)) <= jnp.sum(factors["w"].a ** 2))
      True

    Source: arXiv 2210.07558, algorithm 1 (without its freezing of the rows before the drawn one).
    """
    given = jnp.asarray([_checked(plan, rank) for rank in ranks], jnp.int32)
    if not len(ranks):
        raise PlanError("nested training needs at least one rank.")

    def loss(base: Any, factors: FactorTree, batch: Any, key: Array) -> Any:
        own, draw = jax.random.split(key)
        rank = given[jax.random.randint(draw, (), 0, len(ranks))]
        return loss_fn(base, _masked(plan, factors, rank), batch, own)

    return loss


def first_rows(plan: Plan, factors: FactorTree, rank: int) -> tuple[Plan, dict[str, Any]]:
    """Cut an adapter off after its first rows: the rank-r adapter that nested training has made, of the same scale.

    Args:
      plan, factors: of the adapter.
      rank: at most that of every site.

    Returns:
      (plan, factors) of the smaller adapter; its alpha is such that each row counts as before.

    Raises:
      PlanError: a rank above a site's, a method whose scale depends on the rank alone.
    """
    _checked(plan, rank)
    sites, out = [], dict(factors)
    for site in plan.sites:
        setting = _of_rank(site, rank)
        rows = method_of(site.setting).rows
        leaves = factors[site.path]
        own = {name: getattr(leaves, name)[:rank] for name in rows if getattr(leaves, name, None) is not None}
        out[site.path] = leaves._replace(**own)
        sites.append(replace(site, setting=setting))
    return plan_of_sites(sites, plan.full, plan.compute_dtype), out


def _checked(plan: Plan, rank: Any) -> int:
    if not is_int(rank) or rank < 1:
        raise PlanError(f"a nested rank is {shown(rank)}; it must be an integer of at least 1.")
    for site in plan.sites:
        if rank > site.rank:
            raise PlanError(f"the nested rank {rank} is above the rank {site.rank} of {site.path!r}.")
        rows = method_of(site.setting).rows
        if not rows or getattr(site.setting, "rank", None) is None:
            raise PlanError(f"{site.setting.kind} at {site.path!r} has no rows that ranks could share.")
        smaller = leaf_shapes(replace(site, setting=_of_rank(site, rank)))._asdict()
        for name, x in leaf_shapes(site)._asdict().items():
            cut = None if x is None else (rank, *x.shape[1:]) if name in rows else x.shape
            if cut != (None if smaller[name] is None else smaller[name].shape):
                raise PlanError(
                    f"{site.setting.kind} of rank {site.rank} at {site.path!r}, cut to rank {rank}, is no adapter of "
                    f"that rank: its {name!r} is not made of rows alone."
                )
    return int(rank)


def _of_rank(site: Site, rank: int) -> Any:
    """The setting of a site at another rank, of the same scale."""
    try:
        setting = site.setting.of_rank(rank)  # type: ignore[attr-defined]
    except SpecError as e:  # such as an odd rank of HRA
        raise PlanError(f"nested rank {rank} at {site.path!r}: {e}") from None
    if abs(setting.scale - site.scale) > 1e-6 * abs(site.scale):
        raise PlanError(
            f"{site.setting.kind} at {site.path!r} scales by its rank alone, so its first rows are no adapter of a "
            "smaller rank."
        )
    return setting


def _masked(plan: Plan, factors: FactorTree, rank: Array) -> dict[str, Any]:
    out = dict(factors)
    for site in plan.sites:
        leaves = factors[site.path]
        held = [name for name in method_of(site.setting).rows if getattr(leaves, name) is not None]
        out[site.path] = leaves._replace(**{name: keep_rows(getattr(leaves, name), rank) for name in held})
    return out
