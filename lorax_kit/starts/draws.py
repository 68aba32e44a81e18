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
    rows: Array = (_uniform_rows if uniform else _normal_rows)(key, shape, bound)
    return rows.astype(dtype)


@partial(jax.jit, static_argnums=1)
def _uniform_rows(key: Array, shape: tuple[int, ...], bound: Any) -> Array:
    """(*shape) of U(-bound, bound)."""
    return jax.vmap(lambda k: jax.random.uniform(k, shape[1:], jnp.float32, -bound, bound))(_row_keys(key, shape[0]))


@partial(jax.jit, static_argnums=1)
def _normal_rows(key: Array, shape: tuple[int, ...], bound: Any) -> Array:
    """(*shape) of N(0, bound^2)."""
    rows = jax.vmap(lambda k: jax.random.normal(k, shape[1:], jnp.float32))(_row_keys(key, shape[0]))
    # Else XLA would multiply `bound` by a constant of the draw first, and round otherwise than without `jit`.
    return bound * jax.lax.optimization_barrier(rows)


def _row_keys(key: Array, rows: int) -> Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


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
