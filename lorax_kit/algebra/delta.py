"""The update of one site, in three forms: the normal form, rows alone, and one matrix per stacked parameter.

    delta = out_gain * in_gain * (W + s sum_r a[r] b[r]) - W = (c - 1) W + c s sum_r a[r] b[r],  c = out_gain * in_gain

The second form is what is computed: W' - W would round the update as if it were as large as W.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.algebra.adaptation import AnyAdapter
from lorax_kit.arrays.dtypes import wide
from lorax_kit.core.lowrank import dense, identity_rows
from lorax_kit.core.method import Update, leaf_shapes, update_of
from lorax_kit.core.site import FullSite, Site
from lorax_kit.errors import AdapterError

if TYPE_CHECKING:
    from jaxtyping import Float

HIGHEST = jax.lax.Precision.HIGHEST


class Rows(NamedTuple):
    """An update without gains: delta = sum_r a[r] b[r], the scale folded into b.

    Attributes:
      a: (R, *stack, *in), at least fp32.
      b: (R, *stack, *out).
    """

    a: Array
    b: Array


def _sizes(site: Site) -> tuple[int, int, int]:
    """(S, K, N): stacked matrices, inputs, outputs."""
    return prod(site.stack_shape), prod(site.in_shape), prod(site.out_shape)


def product(site: Site, rows: Rows) -> Float[Array, "S K N"]:
    """sum_r a[r] b[r]."""
    s, k, n = _sizes(site)
    return jnp.einsum("rsk,rsn->skn", rows.a.reshape(-1, s, k), rows.b.reshape(-1, s, n), precision=HIGHEST)


def whole(site: Site, delta: Float[Array, "S K N"]) -> Rows:
    """Any delta as min(K, N) rows, without rounding: one of the factors is the identity."""
    return shaped(site, *identity_rows(delta))


def shaped(site: Site, a: Float[Array, "R S K"], b: Float[Array, "R S N"]) -> Rows:
    """Rows with the site's own axes."""
    return Rows(a.reshape(-1, *site.stack_shape, *site.in_shape), b.reshape(-1, *site.stack_shape, *site.out_shape))


def held(site: Site, rows: Rows) -> Rows:
    """The rows, or min(in, out) others of the same sum where there are more: no rank is above that."""
    return rows if rows.a.shape[0] <= site.max_rank else whole(site, product(site, rows))


def normal_form(site: Site, base: Any, leaves: Any) -> Update:
    """The update of a site in at least fp32, its scale folded into b, of at most min(in, out) rows.

    Args:
      base: the parameter, quantised or not; None if there is none at hand.

    Raises:
      AdapterError: there is no base, and the update depends on it.
    """
    if base is None and reads_base(site):
        raise AdapterError(
            f"the update of {site.path!r} ({site.setting.kind}) depends on the parameter itself.\n"
            "  give the base: base=params"
        )
    w = jnp.zeros(site.shape, site.dtype) if base is None else dense(base)
    update = update_of(site, w, leaves, site.scale)
    dtype = wide(*(x.dtype for x in leaves if x is not None and jnp.issubdtype(x.dtype, jnp.floating)))
    a, b, *gains = (None if x is None else x.astype(dtype) for x in update)
    if a is not None and b is not None:
        a, b = held(site, Rows(a, site.scale * b))
    return Update(a, b, *gains)


def reads_base(site: Site) -> bool:
    """Whether the delta of a site depends on the parameter: a gain does, and some methods' rows."""
    return _reads_base(site.unnamed())


@lru_cache(maxsize=4096)
def _reads_base(site: Site) -> bool:
    w = jax.ShapeDtypeStruct(site.shape, jnp.dtype(site.dtype))
    closed, update = jax.make_jaxpr(lambda w, x: update_of(site, w, x, site.scale), return_shape=True)(
        w, leaf_shapes(site)
    )
    if update.out_gain is not None or update.in_gain is not None:
        return True
    parameter = closed.jaxpr.invars[0]
    used = [v for eqn in closed.jaxpr.eqns for v in eqn.invars]
    return any(v is parameter for v in [*used, *closed.jaxpr.outvars])


def rows_of(site: Site, base: Any, leaves: Any) -> Rows:
    """The update of a site as rows alone, exact to rounding for every method; min(in, out) of them where it has gains.

    Raises:
      AdapterError: as `normal_form`.
    """
    update = normal_form(site, base, leaves)
    if update.a is not None and update.b is not None and update.out_gain is None and update.in_gain is None:
        return Rows(update.a, update.b)
    return whole(site, _gained(site, base, update))


def _gained(site: Site, base: Any, update: Update) -> Float[Array, "S K N"]:
    """(c - 1) W + c sum_r a[r] b[r]."""
    s, k, n = _sizes(site)
    w = site.matrices(dense(base))
    dtype = wide(w.dtype, *(x.dtype for x in update if x is not None))
    c = jnp.ones((1, 1, 1), dtype)
    if update.out_gain is not None:
        c = c * update.out_gain.astype(dtype).reshape(s, 1, n)
    if update.in_gain is not None:
        c = c * update.in_gain.astype(dtype).reshape(s, k, 1)
    delta = (c - 1) * w.astype(dtype)
    if update.a is None or update.b is None:
        return delta
    return delta + c * product(site, Rows(update.a, update.b)).astype(dtype)


def delta_of(site: Site, base: Any, leaves: Any) -> Float[Array, "S K N"]:
    """What the update adds to each of the stacked matrices, in at least fp32.

    Raises:
      AdapterError: as `normal_form`.
    """
    update = normal_form(site, base, leaves)
    if update.a is not None and update.b is not None and update.out_gain is None and update.in_gain is None:
        return product(site, Rows(update.a, update.b))
    return _gained(site, base, update)


def full_delta(leaf: FullSite, adapter: AnyAdapter, base: Mapping[str, Any]) -> Array:
    """Value less base of a parameter trained in full, in at least fp32.

    Raises:
      AdapterError: there is no base.
    """
    if leaf.path not in base:
        raise AdapterError(
            f"{leaf.path!r} is trained in full: its delta is its value less the base.\n  give the base: base=params"
        )
    value = jnp.asarray(adapter.factors[leaf.path].value)
    dtype = wide(value.dtype)
    return value.astype(dtype) - jnp.asarray(base[leaf.path]).astype(dtype)
