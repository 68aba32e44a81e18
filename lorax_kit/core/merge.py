"""`split` params into (base, factors), and its exact inverse `merge`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.arrays.dtypes import wide
from lorax_kit.arrays.finite import all_finite
from lorax_kit.arrays.placement import everywhere, like, partitioned
from lorax_kit.core.leaves import FactorTree, FullLeaf, check_factors, check_key
from lorax_kit.core.lowrank import dense, outer
from lorax_kit.core.method import Hints, Method, method_of, update_of
from lorax_kit.core.paths import Params, deleted, flatten, unflatten
from lorax_kit.core.plan import Plan
from lorax_kit.core.quantised import Quantised
from lorax_kit.core.site import FullSite, Site
from lorax_kit.errors import AdapterError, PlanError


def split(
    params: Params, plan: Plan, key: Array, *, hints: Mapping[str, Hints] | None = None
) -> tuple[Params, dict[str, Any]]:
    """Split params into a frozen base and the trainable factors.

    The base shares every buffer with `params`: nothing is copied. `merge(*split(params, plan, key), plan)`
    returns `params` bit for bit.

    Args:
      params: the pytree that the plan was resolved against.
      plan: from `lk.resolve`.
      key: a JAX random key; each site and row folds its own from it.
      hints: path -> what a start that looks at data needs (`lk.calibrate` returns it).

    Returns:
      (base, factors): the base has the structure of `params`; factors is a flat dict by path.

    Example:
      >>> from lorax_kit import LoRA, Spec, resolve
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = resolve(Spec({"w": LoRA(rank=2)}), params, lambda p, x: x @ p["w"], jnp.ones((5, 4)))
      >>> base, factors = split(params, plan, jax.random.key(0))
      >>> factors["w"].a.shape, factors["w"].b.shape
      ((2, 4), (2, 3))
    """
    check_key(key)
    if hints is not None and not (isinstance(hints, Mapping) and all(isinstance(h, Hints) for h in hints.values())):
        raise PlanError("hints must map paths to lk.Hints, as lk.calibrate returns them.")
    named, _ = flatten(params)
    check_params(named, plan)
    factors: dict[str, Any] = {}
    for site in plan.sites:
        hint = (hints or {}).get(site.path, Hints())
        w = dense(named[site.path])
        init = partial(method_of(site.setting).init, site)
        factors[site.path] = partitioned(init, everywhere(w), w, key, hint)
    for leaf in plan.full:
        # A copy: the factors may be donated to a step, and the base must outlive them.
        factors[leaf.path] = FullLeaf(jnp.array(named[leaf.path], dtype=leaf.dtype, copy=True))
    return params, factors


def check_params(named: dict[str, Any], plan: Plan) -> None:
    """Raise `PlanError` unless every planned parameter is there with the planned shape."""
    for path, x in named.items():
        if deleted(x):
            raise PlanError(
                f"the buffer of {path!r} was deleted: the base was donated to a function.\n"
                "  never donate the base (donate_argnums must leave it out), or load the params again"
            )
    everything: list[Site | FullSite] = [*plan.sites, *plan.full]
    for planned in everything:
        path, leaf = planned.path, named.get(planned.path)
        if leaf is None:
            wrong = f"the plan adapts {path!r}, which these params do not have."
        elif leaf.shape != planned.shape:
            wrong = f"{path!r} has shape {leaf.shape}, the plan expects {planned.shape}."
        elif isinstance(planned, FullSite) and isinstance(leaf, Quantised):
            raise PlanError(f"{path!r} is quantised, and the plan trains it in full.\n  leave it out of lk.quantize")
        elif isinstance(planned, Site) and str(leaf.dtype) != planned.dtype:
            wrong = f"{path!r} has dtype {leaf.dtype}, the plan expects {planned.dtype}."
        else:
            continue
        raise PlanError(
            f"{wrong}\n  resolve the spec against these params: lk.resolve(spec, params, apply_fn, *inputs)"
        )


def delta(site: Site, w: Array, leaves: Any, scale: Any = None) -> Array:
    """What adaptation adds to `w`, gains included: W' - W in the parameter's own layout, in at least fp32."""
    return _effective(site, w, leaves, scale)[0] - w.astype(_dtype(w, leaves))


def effective_weight(site: Site, w: Array, leaves: Any, scale: Any = None) -> Array:
    """The parameter that the adapted function behaves as if it had, in the dtype of `w`.

    Summed in at least fp32 and rounded once. Where the update is exactly zero, the bits of `w` are kept
    (adding +0.0 would turn -0.0 into +0.0).

    Args:
      scale: in place of the plan's; it may be traced.
    """
    effective = partial(_merged, site.unnamed(), method_of(site.setting))
    merged: Array = partitioned(effective, like(w), w, leaves, scale)
    return merged


@partial(jax.jit, static_argnums=(0, 1))
def _merged(site: Site, method: Method, w: Array, leaves: Any, scale: Any) -> Array:
    """One program for all sites alike; `method` is what its kind stands for now, which `register` may change."""
    total, unchanged = _effective(site, w, leaves, scale)
    return _kept(unchanged, w, total.astype(w.dtype))


def beyond(path: str, largest: Any, stored: str) -> AdapterError:
    """The error for a parameter that is finite, and no more so as it is stored."""
    return AdapterError(
        f"{path!r} has values up to {float(largest):.4g} once merged, which {stored} cannot hold.\n"
        "  store it in a dtype of a wider range: bfloat16 or float32"
    )


def _check_held(path: str, merged: Array, before: Array, summed: Callable[[], Array]) -> None:
    """Raise `AdapterError` where a parameter was finite and its sum left the range of a narrow dtype (outside jit)."""
    if isinstance(merged, jax.core.Tracer) or float(jnp.finfo(merged.dtype).max) > 1e30:
        return
    if all_finite(merged) or not all_finite(before):
        return
    raise beyond(path, jnp.max(jnp.abs(summed())), str(merged.dtype))


def _dtype(w: Array, leaves: Any) -> Any:
    """What a site is summed in."""
    return wide(w.dtype, *(x.dtype for x in leaves if x is not None and jnp.issubdtype(x.dtype, jnp.floating)))


def _effective(site: Site, w: Array, leaves: Any, scale: Any) -> tuple[Array, Array]:
    """W' before it is rounded, and where it is W."""
    scale, dtype, axes = site.scale if scale is None else scale, _dtype(w, leaves), site.axes
    update = update_of(site, w, leaves, scale)
    total, unchanged = w.astype(dtype), jnp.ones((), bool)
    if update.a is not None and update.b is not None:
        product = jnp.asarray(scale, dtype) * outer(update.a, update.b, axes.inputs, axes.outputs, axes.stack, dtype)
        total, unchanged = total + product, product == 0
    for gain, own in ((update.out_gain, axes.outputs), (update.in_gain, axes.inputs)):
        if gain is not None:
            c = spread(site, gain.astype(dtype), own)
            total, unchanged = c * total, unchanged & (c == 1)
    return total, unchanged


def _summed(site: Site, w: Array, leaves: Any) -> Array:
    return _effective(site, w, leaves, None)[0]


@jax.custom_jvp
def _kept(unchanged: Array, w: Array, total: Array) -> Array:
    """`total`, but the bits of `w` where nothing changed; its derivative is that of `total` everywhere."""
    return jnp.where(unchanged, w, total)


@_kept.defjvp
def _kept_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    return _kept(*primals), tangents[2]


def spread(site: Site, gain: Array, own: tuple[int, ...]) -> Array:
    """Broadcast (*stack, *own) against the parameter's own layout, `own` being its axes of inputs or of outputs."""
    order = (*site.axes.stack, *own)
    gain = jnp.transpose(gain, tuple(order.index(i) for i in sorted(order)))
    return jnp.expand_dims(gain, tuple(i for i in range(len(site.shape)) if i not in order))


def merge(base: Params, factors: FactorTree, plan: Plan) -> Params:
    """Params with the adaptation folded in: the inverse of `split` at init, a deployable model after training.

    Quantised parameters come out restored. The base is not changed, so "unmerging" is keeping it.

    Raises:
      AdapterError: factors that do not fit the plan, or that are not finite; a sum that leaves the range of its
        parameter's float16 or narrower dtype (both checked outside jit).
      PlanError: a base that does not fit the plan.
    """
    check_factors(plan, factors)
    for path, leaf in factors.items():
        for name, x in leaf._asdict().items():
            if x is None or isinstance(x, jax.core.Tracer):
                continue
            with jax.ensure_compile_time_eval():  # where only the base is traced
                finite = all_finite(x)
            if not finite:
                raise AdapterError(
                    f"{name} of {path!r} holds values that are not finite; merging would spoil the base."
                )
    named, treedef = flatten(base)
    check_params(named, plan)
    merged = {path: x.restore() if isinstance(x, Quantised) else x for path, x in named.items()}
    for site in plan.sites:
        w, leaves = jnp.asarray(merged[site.path]), factors[site.path]
        merged[site.path] = effective_weight(site, w, leaves)
        _check_held(site.path, merged[site.path], w, partial(_summed, site, w, leaves))
    for full in plan.full:
        leaf = factors[full.path]
        assert isinstance(leaf, FullLeaf)
        merged[full.path] = leaf.value.astype(named[full.path].dtype)
        _check_held(full.path, merged[full.path], leaf.value, partial(jnp.asarray, leaf.value))
    return unflatten(merged, treedef)
