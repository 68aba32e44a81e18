"""The frozen base of a problem in another form: cast, or with some of its parameters in few bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lorax_kit.core.paths import Packed, Params, flatten, is_array, unflatten
from lorax_kit.core.quantised import Quantised, quantize
from lorax_kit.core.specs.patterns import literal


def cast(params: Params, dtype: str | None) -> Params:
    """The params with every float array in `dtype`; None: as they are."""
    if dtype is None:
        return params
    named, treedef = flatten(params)

    def held(x: Any) -> Any:
        if not is_array(x) or isinstance(x, Packed) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.asarray(x).astype(dtype)

    return unflatten({path: held(x) for path, x in named.items()}, treedef)


def based(params: Params, dtype: str | None, method: str | None, paths: Sequence[str]) -> Params:
    """The base of a condition.

    Args:
      dtype: of float arrays; None: as they are.
      method: of `lk.quantize` for the parameters at `paths`; None: as they are.
    """
    params = cast(params, dtype)
    return params if method is None or not paths else quantize(params, [literal(p) for p in paths], method)


def restored(base: Params) -> Params:
    """The base with quantised parameters as plain arrays."""
    named, treedef = flatten(base)
    return unflatten({p: x.restore() if isinstance(x, Quantised) else x for p, x in named.items()}, treedef)
