"""`quantise`: a base whose matrices are kept in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.core.compact import METHODS, NF4, Quantised
from lorax_kit.core.errors import PlanError
from lorax_kit.core.paths import flatten, is_array, unflatten
from lorax_kit.core.plan import matched


def _quantised(x: Array, method: str, block: int, double: bool) -> Quantised:
    *lead, n = x.shape
    block = min(block, n + n % 2)
    filled = jnp.pad(x.astype(jnp.float32), [(0, 0)] * len(lead) + [(0, -n % block)])
    blocks = filled.reshape(*lead, -1, block)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    step = offset = None
    stored = scales
    if double:
        axes = tuple(range(max(scales.ndim - 2, 0), scales.ndim))  # one range per matrix
        offset = jnp.min(scales, axis=axes, keepdims=True)
        step = jnp.maximum((jnp.max(scales, axis=axes, keepdims=True) - offset) / 255, jnp.finfo(jnp.float32).tiny)
        stored = jnp.round((scales - offset) / step).astype(jnp.uint8)
        scales = stored.astype(jnp.float32) * step + offset
    unit = blocks / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)[..., None]
    unit = jnp.clip(unit, -1, 1).reshape(filled.shape)
    if method == "int8":
        codes = jnp.round(unit * 127).astype(jnp.int8)
    else:
        middle = jnp.asarray((NF4[1:] + NF4[:-1]) / 2)
        four = jnp.searchsorted(middle, unit) if method == "nf4" else jnp.round(unit * 7) + 8
        four = four.astype(jnp.uint8)
        codes = (four[..., 0::2] << 4) | four[..., 1::2]
    return Quantised(
        codes=codes,
        scales=stored,
        step=step,
        offset=offset,
        shape=tuple(x.shape),
        dtype=x.dtype,
        method=method,
        block=block,
    )


def quantise(base: Any, patterns: Sequence[str], method: str = "nf4", *, block: int = 64, double: bool = True) -> Any:
    """A base whose matching parameters are kept in 8 or 4 bits and restored where `lk.adapt` uses them.

    The factors stay as they are and learn what rounding took away (QLoRA, arXiv 2305.14314). A 4-bit entry takes
    0.5 bytes and its share of a scale: 1 / 64 byte with double quantisation, 4 / 64 without.

    Args:
      base: params, or the base of `lk.split`; not changed.
      patterns: of the paths to quantise, as in `lk.Spec`; each must match a float array of at least two axes.
      method: "int8", "int4" (both symmetric) or "nf4".
      block: entries along the last axis that share a scale; fewer where that axis is shorter.
      double: keep the scales in 8 bits, too (one fp32 range per matrix).

    Returns:
      The same tree with `Quantised` leaves. `lk.adapt`, `lk.merge` and adapters take it as a base.

    Raises:
      PlanError: an unknown method, a pattern that matches nothing, a parameter that is not a float matrix.

    Example:
      >>> base = quantise({"w": jnp.ones((64, 128))}, ["w"], "int8", double=False)
      >>> base["w"].nbytes, bool(jnp.allclose(base["w"].restore(), 1.0))
      (8704, True)
    """
    if method not in METHODS:
        raise PlanError(f"method {method!r} is unknown; choose from {', '.join(METHODS)}.")
    if not isinstance(block, int) or block < 2 or block % 2:
        raise PlanError(f"block is {block!r}; it must be an even number of entries, at least 2.")
    named, treedef = flatten(base)
    names = [p for p, x in named.items() if is_array(x)]
    chosen: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        chosen.update(dict.fromkeys(matched(repr(pattern), pattern, names, " to quantise")))
    out = dict(named)
    for path in chosen:
        x = named[path]
        if isinstance(x, Quantised) or not jnp.issubdtype(x.dtype, jnp.floating) or len(x.shape) < 2:
            kind = f"{x.method}" if isinstance(x, Quantised) else f"{x.dtype} of shape {x.shape}"
            raise PlanError(f"{path!r} is {kind}; only float parameters of at least 2 axes are quantised.")
        if 0 in x.shape:
            raise PlanError(f"{path!r} of shape {x.shape} is empty: there is nothing to quantise.")
        if not isinstance(x, jax.core.Tracer) and not bool(jnp.isfinite(x).all()):
            raise PlanError(f"{path!r} holds values that are not finite; they would spoil the scales of others.")
        out[path] = _quantised(jnp.asarray(x), method, block, double)
    return unflatten(out, treedef)
