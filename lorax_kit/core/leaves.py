"""The trainable tree: a flat dict, path -> the leaves of the site's method, path -> `FullLeaf` for full ones.

Leaves are rank-first: a (r, *stack, *in), b (r, *stack, *out), the update a^T b summed over r. If row i of both
is zero, its gradients are zero and it stays zero under SGD, Adam and AdamW: a rank-r trial is a rank-R trial whose
last R - r rows start at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.core.method import frozen_leaves, leaf_shapes, method_of
from lorax_kit.core.paths import deleted, is_array
from lorax_kit.core.plan import Plan
from lorax_kit.core.site import Site
from lorax_kit.errors import AdapterError, LoraxError


class FullLeaf(NamedTuple):
    """A parameter trained in full."""

    value: Array


FactorTree = Mapping[str, Any]
"""The trainable tree: path -> a NamedTuple of arrays, the method's own or `FullLeaf`."""


def check_key(key: Any, name: str = "the key") -> None:
    """Raise `LoraxError` unless `key` is one random key: typed, or the uint32 words of a raw one."""
    dtype, ndim = getattr(key, "dtype", None), getattr(key, "ndim", None)
    typed = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed and ndim == 0) and not (dtype == jnp.uint32 and ndim == 1):
        given = repr(key) if dtype is None else f"an array of shape {key.shape} and dtype {dtype}"
        raise LoraxError(f"{name} is {given}; it must be one random key.\n  make it: jax.random.key(0)")


def site_key(key: Array, path: str) -> Array:
    """The random key of one site: independent of which other sites exist."""
    return jax.random.fold_in(key, crc32(path.encode()))


def trained_only(plan: Plan, factors: FactorTree) -> dict[str, Any]:
    """The factors without their frozen leaves: what counts as trained."""
    frozen = {site.path: dict.fromkeys(frozen_leaves(site.setting)) for site in plan.sites}
    frozen |= {leaf.path: {"value": None} for leaf in plan.full if not leaf.trained}
    return {path: leaves._replace(**frozen.get(path, {})) for path, leaves in factors.items()}


def keep_rows(x: Array, count: Any) -> Array:
    """A leaf with zeros in all rows after the first `count`, which may be traced."""
    kept = jnp.arange(x.shape[0]) < count
    return jnp.where(kept.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)


def penalty(plan: Plan, factors: Any) -> Array:
    """The sum of the methods' own terms of the loss (AdaLoRA's orthogonality), fp32 (); zero where none has one.

    Args:
      plan: from `lk.resolve`.
      factors: the tree that `lk.split` returns.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), params, lambda p, x: x @ p["w"], jnp.ones((5, 4)))
      >>> float(lk.penalty(plan, lk.split(params, plan, jax.random.key(0))[1]))
      0.0
    """
    total = jnp.zeros((), jnp.float32)
    for site in plan.sites:
        term = method_of(site.setting).penalty
        if term is not None:
            total = total + term(site, factors[site.path]).astype(jnp.float32)
    return total


def check_factors(plan: Plan, factors: FactorTree) -> None:
    """Raise `AdapterError` unless `factors` has exactly the plan's paths and shapes, and its buffers."""
    if not isinstance(factors, Mapping):
        raise AdapterError(
            f"the factors are a {type(factors).__name__}; they must be the dict that lk.split returns.\n"
            "  call adapted(base, factors, *inputs)"
        )
    expected = set(plan.trained)
    for word, names in (("lack", expected - set(factors)), ("hold the unplanned", set(factors) - expected)):
        if names:
            raise AdapterError(
                f"the factors {word} {min(names)!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "") + ".\n"
                f"  the plan has {len(expected)} trained parameters, the factors {len(factors)}: were they split "
                "by this plan?"
            )
    for path, leaves in factors.items():
        if deleted(leaves):
            raise AdapterError(f"the factors of {path!r} were deleted: they were donated to a step.\n  give its result")
    for site in plan.sites:
        _check_leaves(site, factors[site.path])
    for leaf in plan.full:
        value = factors[leaf.path]
        if not isinstance(value, FullLeaf) or getattr(value.value, "shape", None) != leaf.shape:
            raise AdapterError(f"the factors at {leaf.path!r} do not hold a full leaf of shape {leaf.shape}.")
        _check_float("value", leaf.path, value.value)


def _check_leaves(site: Site, leaves: Any) -> None:
    method, expected = method_of(site.setting), leaf_shapes(site)
    if not isinstance(leaves, method.leaves):
        raise AdapterError(
            f"{site.path!r} is planned as {site.setting.kind}, whose leaves are {method.leaves.__name__}, "
            f"but its leaves are {type(leaves).__name__}."
        )
    for name, want in expected._asdict().items():
        x = getattr(leaves, name)
        if (x is None) != (want is None):
            have = "has no" if x is None else "has a"
            raise AdapterError(
                f"the leaves at {site.path!r} ({site.setting.kind}) {have} {name!r}, "
                f"which its setting {'needs' if x is None else 'does without'}."
            )
        if x is None:
            continue
        if not is_array(x):
            raise AdapterError(f"{name} of {site.path!r} is a {type(x).__name__}; leaves are arrays.")
        if x.shape != want.shape:
            raise AdapterError(
                f"{name} at {site.path!r} has shape {x.shape}.\n"
                f"  the plan ({site.setting.kind}, rank {site.rank}) expects {want.shape}"
            )
        if jnp.issubdtype(want.dtype, jnp.floating):
            _check_float(name, site.path, x)


def _check_float(name: str, path: str, x: Any) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise AdapterError(f"{name} of {path!r} is {x.dtype}; leaves are real floats.")
