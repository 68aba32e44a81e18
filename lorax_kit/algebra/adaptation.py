"""What the algebra takes and gives: a plan with its factors; and what it refuses in its arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.arrays.dtypes import wide
from lorax_kit.core.leaves import FactorTree, FullLeaf, check_factors
from lorax_kit.core.merge import check_params
from lorax_kit.core.paths import Params, flatten, is_array
from lorax_kit.core.plan import Plan, plan_of_sites
from lorax_kit.core.site import FullSite, Site
from lorax_kit.core.specs.setting import LARGEST_FLOAT32, is_number, shown
from lorax_kit.errors import AdapterError
from lorax_kit.methods import Factors, LoRA


class AnyAdapter(Protocol):
    """A plan with its factors: an `Adaptation`, or what `lk.load_adapter` returns."""

    @property
    def plan(self) -> Plan:
        """From `lk.resolve`."""
        ...

    @property
    def factors(self) -> FactorTree:
        """The tree that `lk.split` returns, trained."""
        ...


class Adaptation(NamedTuple):
    """An adapter without what a file keeps beside it.

    Attributes:
      plan: from `lk.resolve`, or of plain LoRA where an operation made it; `lk.save_adapter` takes it.
      factors: as `lk.merge` and `lk.adapt` take them.
      errors: path -> |delta - wanted|_F / |wanted|_F, of the operation that made it: 0 where it is exact to rounding.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), params)
      >>> adapter = Adaptation(plan, lk.split(params, plan, jax.random.key(0))[1])
      >>> adapter.plan.site("w").rank
      2
    """

    plan: Plan
    factors: FactorTree
    errors: Mapping[str, float] = MappingProxyType({})


def checked(adapters: Iterable[AnyAdapter], *, alike: bool = True) -> list[AnyAdapter]:
    """The adapters as a list.

    Args:
      alike: whether all of them must adapt the same parameters.

    Raises:
      AdapterError: none; something else than an adapter; factors that do not fit their plan or are not finite; adapters
        that do not adapt the same parameters in the same way.
    """
    if hasattr(adapters, "plan"):
        raise AdapterError("one adapter was given where several are combined.\n  give a list: [adapter, other]")
    listed = list(adapters)
    if not listed:
        raise AdapterError("there are no adapters to combine; give at least one.")
    for adapter in listed:
        check_adapter(adapter)
    seen = {x.path: (0, x) for x in planned(listed[0].plan)}
    for i, adapter in enumerate(listed[1:], 1):
        by_path = {x.path: x for x in planned(adapter.plan)}
        odd = min({*seen} ^ {*by_path}, default=None) if alike else None
        if odd is not None:
            has, lacks = (0, i) if odd in seen else (i, 0)
            raise AdapterError(
                f"adapter {has} adapts {odd!r} and adapter {lacks} does not: they are not of the same sites.\n"
                "  train both on the same targets"
            )
        for path, x in by_path.items():
            first, other = seen.setdefault(path, (i, x))
            check_same(other, x, f"adapter {first}", f"adapter {i}")
    return listed


def check_same(one: Site | FullSite, other: Site | FullSite, who: str, whose: str) -> None:
    """Raise `AdapterError` unless `who` and `whose` see one parameter alike."""
    path = one.path
    if isinstance(one, Site) != isinstance(other, Site):
        kinds = ["at low rank" if isinstance(x, Site) else "in full" for x in (one, other)]
        raise AdapterError(f"{who} has {path!r} {kinds[0]} and {whose} has it {kinds[1]}: they do not go together.")
    # The dtype in which a parameter is trained in full is the adapter's own.
    for name in ("shape", "dtype", "axes") if isinstance(one, Site) else ("shape",):
        have = [getattr(x, name) for x in (one, other)]
        if have[0] != have[1]:
            raise AdapterError(
                f"{path!r} has {name} {have[0]} in {who} and {have[1]} in {whose}.\n"
                "  they were trained on different bases, or with different functions"
            )


def planned(plan: Plan) -> list[Site | FullSite]:
    """Every parameter of a plan."""
    return [*plan.sites, *plan.full]


def check_adapter(adapter: Any) -> None:
    """Raise `AdapterError` unless it has a plan, and factors that fit it and are finite (where they are known)."""
    if not isinstance(getattr(adapter, "plan", None), Plan) or not hasattr(adapter, "factors"):
        raise AdapterError(
            f"a {type(adapter).__name__} is no adapter: it needs a plan and factors.\n"
            "  lk.load_adapter returns one; of a plan and its factors: lk.algebra.Adaptation(plan, factors)"
        )
    check_factors(adapter.plan, adapter.factors)
    for path, leaves in adapter.factors.items():
        for name, x in leaves._asdict().items():
            if x is not None and not _finite(x):
                raise AdapterError(f"{name} of {path!r} holds values that are not finite.")


def check_result(path: str, *arrays: Any) -> None:
    """Raise `AdapterError` unless what an operation made of a parameter is finite (where it is known)."""
    if not all(_finite(x) for x in arrays if x is not None):
        raise AdapterError(
            f"the result at {path!r} is not finite: it is beyond the range of its dtype.\n"
            "  give smaller weights, or look for large values in the adapters"
        )


def _finite(x: Any) -> bool:
    """Whether all values are finite; true of what is traced."""
    if isinstance(x, jax.core.Tracer):
        return True
    x = np.asarray(x)
    return bool(np.isfinite(x.astype(np.float32) if x.dtype.itemsize < 4 else x).all())


def bases(adapter: AnyAdapter, base: Params | None) -> dict[str, Any]:
    """Path -> parameter; empty without a base.

    Raises:
      PlanError: the base does not fit the plan.
    """
    if base is None:
        return {}
    named = flatten(base)[0]
    check_params(named, adapter.plan)
    return named


def check_weights(weights: Any, count: int) -> list[Any]:
    """One weight for each adapter: finite numbers, or traced scalars; ones without any.

    Raises:
      AdapterError: another number of them, or one that is no finite number.
    """
    if weights is None:
        return [1.0] * count
    if is_number(weights) or (is_array(weights) and not weights.shape) or isinstance(weights, str):
        raise AdapterError(f"weights is {weights!r}; give a list with one number for each of {count} adapters.")
    listed = list(weights)
    if len(listed) != count:
        raise AdapterError(f"there are {len(listed)} weights for {count} adapters; give one for each.")
    return [check_number("a weight", x) for x in listed]


def check_number(name: str, x: Any) -> Any:
    """A finite number of float32's range as a float; a traced scalar as it is.

    Raises:
      AdapterError: anything else.
    """
    if isinstance(x, jax.core.Tracer) and x.shape == ():
        return x
    value = x.item() if is_array(x) and x.shape == () else x
    if not is_number(value) or not abs(value) <= LARGEST_FLOAT32:
        raise AdapterError(f"{name} is {shown(x)}; it must be a finite number of float32's range.")
    return float(value)


def check_share(name: str, x: Any) -> float:
    """A number in (0, 1].

    Raises:
      AdapterError: anything else.
    """
    if not is_number(x) or not 0 < x <= 1:
        raise AdapterError(f"{name} is {x!r}; it must lie in (0, 1].")
    return float(x)


def check_rank(rank: Any, sites: Sequence[Site]) -> None:
    """Raise `AdapterError` unless it is a rank that every site can hold, or None."""
    if rank is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 1:
        raise AdapterError(f"rank is {rank!r}; it must be an integer of at least 1.")
    for site in sites:
        if rank > site.max_rank:
            raise AdapterError(
                f"rank {rank} at {site.path!r} is above min(in, out) = {site.max_rank} "
                f"(in {site.in_shape}, out {site.out_shape}).\n  lower the rank"
            )


def check_key(key: Any) -> None:
    """Raise `AdapterError` unless it is one random key, typed or of two integers."""
    typed = is_array(key) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    if not typed and not (is_array(key) and key.dtype == jnp.uint32 and key.shape == (2,)):
        raise AdapterError(f"key is {type(key).__name__}; it must be one random key: jax.random.key(0).")


def plain(
    plans: Sequence[Plan],
    rows: Mapping[str, tuple[Array, Array]],
    full: Mapping[str, Array],
    errors: Mapping[str, float] | None = None,
) -> Adaptation:
    """An adapter of plain LoRA whose delta at a site is sum_r a[r] b[r]: a scale of 1, and the ranks of the rows.

    Every operation that makes an adapter ends here.

    Args:
      plans: of the adapters it was made from; the sites and their order are those of the first.
      rows: path -> (a (R, *stack, *in), b (R, *stack, *out)).
      full: path -> value of what is trained in full.
      errors: of `Adaptation`; zeros by default.

    Raises:
      AdapterError: rows or values that are not finite.
    """
    for path, made in (*rows.items(), *((path, (value,)) for path, value in full.items())):
        check_result(path, *made)
    sites = []
    for site in plans[0].sites:
        a, b = rows[site.path]
        setting = LoRA(rank=a.shape[0], dtype=str(wide(a.dtype, b.dtype)), inputs=site.setting.inputs)
        sites.append(replace(site, setting=setting))
    wholes = [replace(leaf, dtype=str(full[leaf.path].dtype)) for leaf in plans[0].full]
    plan = plan_of_sites(sites, wholes, common_dtype(plans))
    factors: dict[str, Any] = {
        site.path: Factors(*(x.astype(site.setting.dtype) for x in rows[site.path])) for site in sites
    }
    factors |= {leaf.path: FullLeaf(full[leaf.path]) for leaf in wholes}
    return Adaptation(plan, factors, dict.fromkeys(plan.trained, 0.0) | dict(errors or {}))


def common_dtype(plans: Sequence[Plan]) -> str | None:
    """The `compute_dtype` of the plans where they agree, else None."""
    computed = {plan.compute_dtype for plan in plans}
    return computed.pop() if len(computed) == 1 else None
