"""Many adapters in one tree of factors, each padded to the rows of the largest, so that any can be swapped.

What is stacked is the normal form, whatever the methods: rows with their scale folded in, zero rows up to the highest
rank, and gains of 1 where an adapter has none. A row of zeros adds nothing, so each adapter keeps its own rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.algebra.adaptation import (
    AnyAdapter,
    check_adapter,
    check_rank,
    check_result,
    check_same,
    checked,
    common_dtype,
    planned,
)
from lorax_kit.algebra.delta import normal_form
from lorax_kit.arrays.dtypes import wide
from lorax_kit.core.leaves import FullLeaf
from lorax_kit.core.merge import check_params
from lorax_kit.core.method import Update
from lorax_kit.core.paths import Params, flatten
from lorax_kit.core.plan import Plan, plan_of_sites
from lorax_kit.core.site import FullSite, Site
from lorax_kit.errors import AdapterError
from lorax_kit.methods import LoRA


class Stacked(NamedTuple):
    """Adapters of one base, for `per_row`.

    Attributes:
      plan: of every site that any of them adapts, as LoRA of the highest rank; static.
      factors: path -> `Update` whose arrays have the adapters on their first axis, (n, R, *stack, *in) and so on; or
        `FullLeaf` of (n, *shape). What `per_row` takes as an argument: `swap` changes its values and not its shapes.
      size: n.
    """

    plan: Plan
    factors: dict[str, Any]
    size: int


def stack(adapters: Iterable[AnyAdapter | None], *, base: Params, rank: int | None = None) -> Stacked:
    """Stack adapters, so that one batch may use all of them.

    Args:
      adapters: of one base; their methods, ranks and sites may differ. None stands for the base as it is.
      base: the frozen params. The gains of DoRA, and rows that depend on the parameter, are computed here, once.
      rank: the least number of rows of each site, or min(in, out) if that is lower: what `swap` may put there later.

    Returns:
      The stack; one compiled program serves it however its adapters are swapped.

    Raises:
      AdapterError: no adapters, or a parameter that two of them adapt along other axes, or one in full and one not.
      PlanError: a base that does not fit one of the plans.

    Example:
      >>> import lorax_kit as lk
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 5, 4))
      >>> f = lambda p, x: x @ p["w"]
      >>> adapters = []
      >>> for rank in (1, 2):
      ...     plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=rank)}), params, f, x)
      ...     adapters.append(lk.algebra.Adaptation(plan, lk.split(params, plan, jax.random.key(0))[1]))
      >>> stacked = stack(adapters, base=params)
      >>> stacked.factors["w"].a.shape, stacked.plan.site("w").rank
      ((2, 2, 4), 2)
    """
    if hasattr(adapters, "plan"):
        raise AdapterError("one adapter was given where several are stacked.\n  give a list: [adapter, other]")
    listed = list(adapters)
    present = checked([adapter for adapter in listed if adapter is not None], alike=False)
    check_rank(rank, [])
    named = flatten(base)[0]
    for adapter in present:
        check_params(named, adapter.plan)
    everything: dict[str, Site | FullSite] = {}
    for adapter in present:
        everything |= {x.path: x for x in planned(adapter.plan)}
    sites, full, factors = [], [], {}
    for where in (everything[path] for path in named if path in everything):
        if isinstance(where, FullSite):
            factors[where.path] = FullLeaf(jnp.stack([_value(where, x, named) for x in listed]))
            full.append(replace(where, dtype=str(factors[where.path].value.dtype)))
        else:
            forms = [_form(where, x, named) for x in listed]
            rows = max([0 if x.a is None else x.a.shape[0] for x in forms] + [min(rank or 0, where.max_rank)])
            gains = any(x.out_gain is not None for x in forms), any(x.in_gain is not None for x in forms)
            padded = [_padded(where, x, rows, gains) for x in forms]
            factors[where.path] = jax.tree.map(lambda *x: jnp.stack(_alike(x)), *padded)
            sites.append(replace(where, setting=LoRA(rank=max(rows, 1), inputs=where.setting.inputs)))
    plan = plan_of_sites(sites, full, common_dtype([adapter.plan for adapter in present]))
    return Stacked(plan, factors, len(listed))


def swap(stacked: Stacked, index: int, adapter: AnyAdapter | None, *, base: Params) -> Stacked:
    """A stack with another adapter in one place, of the same shapes: what was compiled for it still serves.

    Args:
      stacked: from `stack`; not changed.
      index: which adapter is replaced.
      adapter: of sites that the stack has, and no more rows than it has; None for the base as it is.
      base: the frozen params.

    Raises:
      AdapterError: an index out of range; a site, rows or gains that the stack has no place for.
      PlanError: a base that does not fit the adapter's plan.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params)
      >>> adapter = lk.algebra.Adaptation(plan, {"w": lk.Factors(jnp.ones((1, 4)), jnp.ones((1, 3)))})
      >>> swap(stack([adapter, None], base=params), 1, adapter, base=params).factors["w"].a.tolist()
      [[[1.0, 1.0, 1.0, 1.0]], [[1.0, 1.0, 1.0, 1.0]]]
    """
    if isinstance(index, bool) or not isinstance(index, int | np.integer) or not 0 <= index < stacked.size:
        raise AdapterError(f"index is {index!r}; the stack holds adapters 0 to {stacked.size - 1}.")
    named = flatten(base)[0]
    if adapter is not None:
        check_adapter(adapter)
        check_params(named, adapter.plan)
        _check_places(stacked.plan, adapter.plan)
    factors = dict(stacked.factors)
    for leaf in stacked.plan.full:
        value = factors[leaf.path].value
        factors[leaf.path] = FullLeaf(value.at[index].set(_value(leaf, adapter, named).astype(value.dtype)))
    for site in stacked.plan.sites:
        held, form = factors[site.path], _form(site, adapter, named)
        rows = 0 if form.a is None else form.a.shape[0]
        if rows > held.a.shape[1]:
            raise AdapterError(
                f"the adapter has {rows} rows at {site.path!r}, the stack has place for {held.a.shape[1]}.\n"
                f"  stack them anew with rank={rows}, or truncate the adapter"
            )
        for name in ("out_gain", "in_gain"):
            if getattr(form, name) is not None and getattr(held, name) is None:
                raise AdapterError(
                    f"the adapter has gains at {site.path!r}, and none of the stack did: stack them anew."
                )
        padded = _padded(site, form, held.a.shape[1], (held.out_gain is not None, held.in_gain is not None))
        factors[site.path] = jax.tree.map(lambda x, y: x.at[index].set(y.astype(x.dtype)), held, padded)
    return stacked._replace(factors=factors)


def _check_places(plan: Plan, own: Plan) -> None:
    """Raise `AdapterError` unless a stack of `plan` has every site of `own`, with the same axes."""
    known = {x.path: x for x in planned(plan)}
    for where in planned(own):
        there = known.get(where.path)
        if there is None:
            raise AdapterError(f"the adapter adapts {where.path!r}, and none of the stack did: stack them anew.")
        check_same(there, where, "the stack", "the adapter")


def _form(site: Site, adapter: AnyAdapter | None, named: Mapping[str, Any]) -> Update:
    """The normal form of an adapter at a site; without any term where it does not adapt it."""
    if adapter is None or site.path not in adapter.factors:
        return Update()
    form = normal_form(adapter.plan.site(site.path), named[site.path], adapter.factors[site.path])
    check_result(site.path, *form)
    return form


def _value(leaf: FullSite, adapter: AnyAdapter | None, named: Mapping[str, Any]) -> Array:
    """What an adapter has in place of a parameter, in at least fp32."""
    own = adapter is not None and leaf.path in adapter.factors
    value = jnp.asarray(adapter.factors[leaf.path].value if own and adapter is not None else named[leaf.path])
    return value.astype(wide(value.dtype, named[leaf.path].dtype))


def _padded(site: Site, form: Update, rows: int, gains: tuple[bool, bool]) -> Update:
    """A normal form with zero rows and gains of 1 where it lacks them."""
    ins, outs = (*site.stack_shape, *site.in_shape), (*site.stack_shape, *site.out_shape)
    a, b = (
        jnp.zeros((rows, *shape), jnp.float32)
        if x is None
        else jnp.pad(x, [(0, rows - len(x))] + [(0, 0)] * len(shape))
        for x, shape in ((form.a, ins), (form.b, outs))
    )
    out_gain, in_gain = (
        None if not wanted else jnp.ones(shape, jnp.float32) if x is None else x
        for x, shape, wanted in zip((form.out_gain, form.in_gain), (outs, ins), gains, strict=True)
    )
    return Update(a, b, out_gain, in_gain)


def _alike(arrays: tuple[Array, ...]) -> list[Array]:
    """Arrays in the widest of their dtypes."""
    dtype = wide(*(x.dtype for x in arrays))
    return [x.astype(dtype) for x in arrays]
