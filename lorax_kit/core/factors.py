"""The trainable tree: a flat dict, path -> `Factors` for low-rank sites, path -> `FullLeaf` for full ones.

Factors are rank-first: a (r, *stack, *in), b (r, *stack, *out), delta = a^T b summed over r. Rows are drawn
with a key per site *and per row*, fold_in(fold_in(key, crc32(path)), row): adding a site changes no other
site, and the first r rows of a rank-R draw are the rank-r draw. If row i of both factors is zero, its
gradients are zero and it stays zero under SGD, Adam and AdamW: a rank-r trial is a rank-R trial whose last
R - r rows start at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.core.errors import AdapterError
from lorax_kit.core.plan import Plan, Site

if TYPE_CHECKING:
    from jaxtyping import Float


class Factors(NamedTuple):
    """Factors of one site.

    Attributes:
      a: (rank, *stack, *in).
      b: (rank, *stack, *out).
      magnitude: (*stack, *out), DoRA only.
      scale: () replaces the plan's static scale; a traced per-trial scalar, never trained.
    """

    a: Array
    b: Array
    magnitude: Array | None = None
    scale: Array | None = None


class FullLeaf(NamedTuple):
    """A parameter trained in full."""

    value: Array


FactorTree = Mapping[str, Factors | FullLeaf]
"""The trainable tree."""


def site_key(key: Array, path: str) -> Array:
    """The random key of one site: independent of which other sites exist."""
    return jax.random.fold_in(key, crc32(path.encode()))


def draw_rows(key: Array, shape: tuple[int, ...], fan_in: int, init: str, dtype: Any) -> Float[Array, "r ..."]:
    """Draw `shape[0]` rows, each from its own key, so fewer rows are a prefix of more.

    "kaiming_uniform" is U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as torch's Linear and PEFT start A; "normal" is
    N(0, 1/fan_in).
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shape[0]))
    bound = fan_in**-0.5
    if init == "kaiming_uniform":
        rows = jax.vmap(lambda k: jax.random.uniform(k, shape[1:], jnp.float32, -bound, bound))(keys)
    else:
        rows = jax.vmap(lambda k: bound * jax.random.normal(k, shape[1:], jnp.float32))(keys)
    return rows.astype(dtype)


def init_lowrank(site: Site, key: Array) -> Factors:
    """Draw one factor and zero the other, so that delta is zero: `a` drawn, or `b` where rows are looked up.

    A looked-up embedding draws `b` from N(0, 1) and zeroes `a`, as PEFT does.
    """
    key = site_key(key, site.path)
    dtype = jnp.dtype(site.setting.dtype)
    if site.lookup:
        return Factors(jnp.zeros(site.a_shape, dtype), draw_rows(key, site.b_shape, 1, "normal", dtype))
    a = draw_rows(key, site.a_shape, prod(site.in_shape), site.setting.init, dtype)
    return Factors(a, jnp.zeros(site.b_shape, dtype))


def check_factors(plan: Plan, factors: FactorTree) -> None:
    """Raise `AdapterError` unless `factors` has exactly the plan's paths and shapes."""
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
    for site in plan.sites:
        found = factors[site.path]
        if not isinstance(found, Factors):
            raise AdapterError(f"{site.path!r} is planned as low-rank, but its factors are {type(found).__name__}.")
        if found.a.shape != site.a_shape or found.b.shape != site.b_shape:
            raise AdapterError(
                f"the factors at {site.path!r} have shapes a {found.a.shape}, b {found.b.shape}.\n"
                f"  the plan (rank {site.setting.rank}) expects a {site.a_shape}, b {site.b_shape}"
            )
        for name, x in (("a", found.a), ("b", found.b)):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise AdapterError(f"{name} of {site.path!r} is {x.dtype}; factors are real floats.")
        size = (*site.stack_shape, *site.out_shape)
        if found.magnitude is not None and found.magnitude.shape != size:
            raise AdapterError(
                f"the magnitude at {site.path!r} has shape {found.magnitude.shape}, the plan expects {size}."
            )
    for leaf in plan.full:
        value = factors[leaf.path]
        if not isinstance(value, FullLeaf) or value.value.shape != leaf.shape:
            raise AdapterError(f"the factors at {leaf.path!r} do not hold a full leaf of shape {leaf.shape}.")
