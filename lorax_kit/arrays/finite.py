"""Whether numbers are finite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def all_finite(x: Any) -> bool:
    """Whether no entry of an array is infinite or NaN; outside `jit`, and wherever the array lies."""
    return bool(_all_finite(x))


@jax.jit
def _all_finite(x: Array) -> Array:
    return jnp.isfinite(x).all()
