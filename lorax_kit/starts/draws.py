"""Random starts: one factor drawn, the other zero.

Rows are drawn with a key per site *and per row*, fold_in(fold_in(key, crc32(path)), row): adding a site changes no
other site, and the first r rows of a rank-R draw are the rank-r draw.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.core.method import Hints
from lorax_kit.core.site import Site
from lorax_kit.starts.start import Start

if TYPE_CHECKING:
    from jaxtyping import Float


def draw_rows(
    key: Array, shape: tuple[int, ...], bound: float, *, uniform: bool = False, dtype: Any = jnp.float32
) -> Float[Array, "r ..."]:
    """Draw `shape[0]` rows, each from its own key: N(0, bound^2), or U(-bound, bound)."""
    rows: Array = _drawn_rows(key, shape, bound, uniform, dtype)
    return rows


@partial(jax.jit, static_argnums=(1, 3, 4))
def _drawn_rows(key: Array, shape: tuple[int, ...], bound: Any, uniform: bool, dtype: Any) -> Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shape[0]))
    if uniform:
        rows = jax.vmap(lambda k: jax.random.uniform(k, shape[1:], jnp.float32, -bound, bound))(keys)
    else:
        rows = jax.vmap(lambda k: bound * jax.random.normal(k, shape[1:], jnp.float32))(keys)
    return rows.astype(dtype)


def kaiming(site: Site, w: Array, key: Array, hints: Hints) -> Start:
    """`a` from U(-1/sqrt(in), 1/sqrt(in)), as torch's Linear and PEFT start A; of a lookup `b` from N(0, 1)."""
    return _drawn(site, key, uniform=True)


def normal(site: Site, w: Array, key: Array, hints: Hints) -> Start:
    """`a` from N(0, 1/in); of a lookup `b` from N(0, 1)."""
    return _drawn(site, key, uniform=False)


def _drawn(site: Site, key: Array, uniform: bool) -> Start:
    # A looked-up table draws `b` and zeroes `a`, as PEFT does: a row of `a` is read by one token only.
    if site.lookup:
        return Start(None, draw_rows(key, site.b_shape, 1.0))
    return Start(draw_rows(key, site.a_shape, prod(site.in_shape) ** -0.5, uniform=uniform), None)
