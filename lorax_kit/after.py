"""An order of computation that holds through compilation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def after(x: Array, values: Any) -> Any:
    """The arrays of a tree, which XLA can compute only once it has `x`; random keys and what is no array as they are.

    What depends on parameters alone (sums, restored weights) XLA would form for all layers at the start; what the
    backward pass forms again it would find in the forward pass, and keep in between. Its barriers are dropped before
    it schedules. No entry is both infinite and not a number, which XLA does not know.
    """
    entry = lax.reshape(lax.slice(x, (0,) * x.ndim, (1,) * x.ndim), ())
    never = lax.bitwise_and(lax.ne(entry, entry), lax.eq(lax.abs(entry), lax.full_like(entry, jnp.inf)))

    def wait(value: Any) -> Any:
        if not isinstance(value, Array) or jnp.issubdtype(value.dtype, jax.dtypes.extended):
            return value
        return lax.select(never, lax.full_like(value, 0), value)

    return jax.tree.map(wait, values)
