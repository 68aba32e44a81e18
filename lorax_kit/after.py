"""An order of computation that holds through compilation."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array, lax


def after(x: Array, values: Any) -> Any:
    """The arrays of a tree, which XLA can compute only once it has `x`; random keys and what is no array as they are.

    What depends on parameters alone (sums, restored weights) XLA would form for all layers at the start; what the
    backward pass forms again it would find in the forward pass, and keep in between. Its barriers are dropped before
    it schedules. No entry is both infinite and not a number, which XLA does not know.
    """
    if 0 in x.shape:  # of a weight that gains alone adapt: there is nothing to wait for
        return values
    entry = lax.reshape(lax.slice(x, (0,) * x.ndim, (1,) * x.ndim), ())
    infinite = lax.eq(lax.abs(entry), np.asarray(np.inf, entry.dtype))  # numpy's numbers are the fastest to trace
    never = lax.bitwise_and(lax.ne(entry, entry), infinite)

    def wait(value: Any) -> Any:
        if not isinstance(value, Array) or jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
            return value
        return lax.select_n(never, value, lax.broadcast_in_dim(np.zeros((), value.dtype), value.shape, ()))

    return jax.tree.map(wait, values)
