"""Which dtype holds which, whatever `jax_numpy_dtype_promotion` says: what is widened here is cast by name."""

from __future__ import annotations

from functools import cache, reduce
from typing import Any

import jax
import jax.numpy as jnp


def widest(*dtypes: Any) -> Any:
    """The narrowest dtype that holds all of `dtypes`; of 8 bits and less beside others one of at least 16."""
    return _widest(*map(jnp.dtype, dtypes))


@cache
def _widest(*dtypes: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):  # jnp.promote_types itself refuses under "strict"
        if len(set(dtypes)) > 1:  # JAX promotes no float of 8 bits or less; bfloat16 holds the values of them all
            dtypes = tuple(jnp.bfloat16 if x.itemsize == 1 and jnp.issubdtype(x, jnp.floating) else x for x in dtypes)
        return jnp.dtype(reduce(jnp.promote_types, dtypes))


def wide(*dtypes: Any) -> Any:
    """The same of `dtypes` and float32: what is summed, or multiplied by a gain, in."""
    return widest(jnp.float32, *dtypes)
