"""Which dtype holds which, whatever `jax_numpy_dtype_promotion` says: what is widened here is cast by name."""

from __future__ import annotations

from functools import cache, reduce
from typing import Any

import jax
import jax.numpy as jnp


def widest(*dtypes: Any) -> Any:
    """The narrowest dtype that holds all of `dtypes`."""
    return _widest(*map(jnp.dtype, dtypes))


@cache
def _widest(*dtypes: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):  # jnp.promote_types itself refuses under "strict"
        return jnp.dtype(reduce(jnp.promote_types, dtypes))


def wide(*dtypes: Any) -> Any:
    """The same of `dtypes` and float32: what is summed, or multiplied by a gain, in."""
    return widest(jnp.float32, *dtypes)
