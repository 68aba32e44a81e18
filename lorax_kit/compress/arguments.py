"""What the functions of compression refuse in their arguments: one check for each kind, each an error in words."""

from __future__ import annotations

from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kit.calibration.arguments import shown
from lorax_kit.core.paths import is_array
from lorax_kit.errors import CompressError


def check_count(name: str, x: Any, least: int = 1) -> int:
    """An integer of at least `least`."""
    if isinstance(x, bool | np.bool) or not isinstance(x, int | np.integer) or x < least:
        raise CompressError(f"{name} is {shown(x)}; it must be an integer of at least {least}.")
    return int(x)


def check_number(name: str, x: Any, least: float = -np.inf) -> float:
    """A finite real number of at least `least`, also from an array of no axes."""
    value = x.item() if is_array(x) and x.shape == () and not isinstance(x, jax.core.Tracer) else x
    if isinstance(value, bool) or not isinstance(value, Real) or not np.isfinite(float(value)) or float(value) < least:
        bound = f" of at least {least:g}" if np.isfinite(least) else ""
        raise CompressError(f"{name} is {shown(x)}; it must be a finite number{bound}.")
    return float(value)


def check_positive(name: str, x: Any) -> float:
    """A finite number above 0."""
    value = check_number(name, x, 0.0)
    if value == 0:
        raise CompressError(f"{name} is 0; it must be a positive number.")
    return value


def check_share(name: str, x: Any) -> float:
    """A number in (0, 1]."""
    if isinstance(x, bool) or not isinstance(x, Real) or not 0 < float(x) <= 1:
        raise CompressError(f"{name} is {shown(x)}; it must lie in (0, 1].")
    return float(x)


def check_word(name: str, x: Any, words: tuple[str, ...]) -> None:
    """One of some words."""
    if not isinstance(x, str) or x not in words:
        raise CompressError(f"{name} {shown(x)} is unknown; choose from {', '.join(words)}.")


def patterns_of(name: str, x: Any) -> tuple[str, ...]:
    """Patterns, of one or of several."""
    patterns = (x,) if isinstance(x, str) else x
    if not isinstance(patterns, list | tuple) or not all(isinstance(one, str) for one in patterns):
        raise CompressError(f"{name} is {shown(x)}; it must be patterns: ('head/*',).")
    return tuple(patterns)


def check_key(key: Any) -> None:
    """Raise `CompressError` unless it is one random key, typed or of two integers."""
    if is_array(key):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if (typed and key.shape == ()) or (key.dtype == jnp.uint32 and key.shape == (2,)):
            return
    raise CompressError(f"key is {shown(key)}; it must be one random key: jax.random.key(0).")
