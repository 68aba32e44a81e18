"""Frozen parameters in few bits: int8, int4 or NF4 codes in blocks with a scale each, encoded and decoded here.

    w ~ scale * value(code)          scale = exp(log_least + log_step (k - 1)), k its own 8-bit code; 0 for k = 0

NF4 and codes for scales are QLoRA's (Dettmers et al., arXiv 2305.14314, section 3). Its scales are coded linearly in
groups of 256; one outlier then rounds the other scales of its group to the same code (MiniLM's int8 error triples with
one group per matrix). Ours are coded by their logarithm, and rounded up: every restored scale is at least the block's
largest entry and less than exp(log_step) times it, whatever the other blocks hold.

Two 4-bit codes share a byte: JAX keeps an int4 array at one code per byte on CPU, twice what it should cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.arrays.finite import all_finite
from lorax_kit.core.paths import Packed, deleted, flatten, is_array, unflatten
from lorax_kit.core.plan import matched
from lorax_kit.errors import PlanError

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (appendix E of the paper).
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
METHODS = ("int8", "int4", "nf4")
TINY = float(jnp.finfo(jnp.float32).tiny)
LEVELS = 254
"""Steps between the least and the largest scale of a matrix: codes 1 to 255."""
WIDEST = 1.125
"""Where one step of the scales' code would be wider, or exp would overflow, scales stay in fp32."""


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, kw_only=True)
class Quantised(Packed):
    """One parameter in blocks along its last axis.

    Attributes:
      codes: int8 (*lead, N), or uint8 (*lead, N / 2) with two 4-bit codes in a byte; N filled up to whole blocks.
      scales: fp32 (*lead, N / block), or uint8 with double quantisation.
      log_least, log_step: fp32, one of each per matrix: what the codes of the scales mean; None where these are fp32.
      shape, dtype: of the parameter that is restored.
      method, block: "int8", "int4" or "nf4", and how many entries share a scale.
    """

    codes: Array
    scales: Array
    log_least: Array | None
    log_step: Array | None
    shape: tuple[int, ...]
    dtype: Any
    method: str
    block: int

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arrays, and what is static."""
        arrays = (self.codes, self.scales, self.log_least, self.log_step)
        return arrays, (self.shape, self.dtype, self.method, self.block)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], arrays: tuple[Any, ...]) -> Quantised:
        """Inverse of `tree_flatten`."""
        names = ("codes", "scales", "log_least", "log_step", "shape", "dtype", "method", "block")
        return cls(**dict(zip(names, (*arrays, *static), strict=True)))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __repr__(self) -> str:
        """Without the codes."""
        return f"Quantised({self.method}, shape={self.shape}, dtype={self.dtype}, block={self.block})"

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def restore(self) -> Array:
        """The parameter, (*shape) in `dtype`.

        Each entry is within half a code of its own block's scale. With double quantisation that scale is up to
        exp(log_step) of the block's largest entry: 1.02 where the scales of a matrix differ 100-fold, 1.125 at most
        (2 for what was quantised under `jit`, where the spread of the values is not known).
        """
        restored: Array = _restored(self)
        return restored

    def rows(self, indices: Array) -> Array:
        """Restore some rows of a matrix alone: (*indices.shape, N); indices out of bounds are clipped."""
        codes, scales = (jnp.take(x, indices, axis=0, mode="clip") for x in (self.codes, self.scales))
        return replace(self, codes=codes, scales=scales, shape=(*indices.shape, self.shape[-1])).restore()


@jax.jit
def _restored(x: Quantised) -> Array:
    if x.method == "int8":
        values = x.codes.astype(jnp.float32) / 127
    else:
        halves = [(x.codes >> 4)[..., None], (x.codes & 15)[..., None]]  # ONNX's converter lacks `stack`
        pairs = jnp.concatenate(halves, axis=-1).reshape(*x.codes.shape[:-1], -1)
        values = jnp.asarray(NF4)[pairs] if x.method == "nf4" else (pairs.astype(jnp.float32) - 8) / 7
    scales = x.scales
    if x.log_least is not None and x.log_step is not None:
        scales = decode_scales(scales, x.log_least, x.log_step)
    blocks = values.reshape(*values.shape[:-1], -1, x.block) * scales[..., None]
    return blocks.reshape(*values.shape)[..., : x.shape[-1]].astype(x.dtype)


def encode_scales(scales: Array) -> tuple[Array, Array, Array]:
    """Code fp32 scales (*lead, B) in 8 bits by their logarithm, rounded up: (codes, log_least, log_step).

    Example:
      >>> codes, least, step = encode_scales(jnp.asarray([[0.0, 1.0], [10.0, 100.0]]))
      >>> codes.tolist(), round(float(jnp.exp(step[0, 0])), 4)
      ([[0, 1], [128, 255]], 1.0183)
    """
    # An argument, since XLA multiplies by the inverse of a constant.
    codes, least, step = _encoded_scales(scales, jnp.float32(LEVELS))
    return codes, least, step


@jax.jit
def _encoded_scales(scales: Array, levels: Array) -> tuple[Array, Array, Array]:
    axes = tuple(range(max(scales.ndim - 2, 0), scales.ndim))  # one range per matrix
    nonzero = scales >= TINY
    logs = jnp.log(jnp.maximum(scales, TINY))
    most = jnp.max(logs, axis=axes, keepdims=True)
    least = jnp.min(jnp.where(nonzero, logs, most), axis=axes, keepdims=True)
    step = (most - least) / levels
    # A thousandth of a step below a level is that level: it was rounded down to there.
    places = jnp.ceil((logs - least) / jnp.maximum(step, TINY) - 1e-3)
    codes = jnp.where(nonzero, 1 + jnp.clip(places, 0, LEVELS), 0).astype(jnp.uint8)
    return codes, least, step


def decode_scales(codes: Array, log_least: Array, log_step: Array) -> Array:
    """Inverse of `encode_scales`, up to the rounding up."""
    # Two programs, since one would round product and sum together: the codes of a base are to stay what they are.
    scales: Array = _exp(log_least, _times(codes, log_step), codes)
    return scales


@jax.jit
def _times(codes: Array, step: Array) -> Array:
    return step.reshape((*(1,) * (codes.ndim - step.ndim), *step.shape)) * (codes.astype(jnp.float32) - 1)


@jax.jit
def _exp(least: Array, steps: Array, codes: Array) -> Array:
    least = least.reshape((*(1,) * (codes.ndim - least.ndim), *least.shape))
    return jnp.where(codes > 0, jnp.exp(least + steps), 0)


def _too_wide(scales: Array, step: Array) -> bool:
    """Whether the code of scales would round too much, as far as values are known."""
    if isinstance(scales, jax.core.Tracer):
        return False
    return bool(_wide(scales, step))


@jax.jit
def _wide(scales: Array, step: Array) -> Array:
    return (jnp.exp(step).max() > WIDEST) | (scales.max() > 1e38)


def _leaves_fp32(x: Array) -> bool:
    """Whether in fp32 an entry were infinite, or all were zero that are not."""
    narrow = x.astype(jnp.float32)
    return not all_finite(narrow) or bool((narrow == 0).all() & (x != 0).any())


def _blocks(x: Array, block: int) -> Array:
    """(*lead, N / block, block) in fp32, filled up with zeros."""
    *lead, n = x.shape
    filled = jnp.pad(x.astype(jnp.float32), [(0, 0)] * len(lead) + [(0, -n % block)])
    return filled.reshape(*lead, -1, block)


@partial(jax.jit, static_argnums=1)
def _largest(x: Array, block: int) -> Array:
    """(*lead, N / block), the largest magnitude of each block."""
    return jnp.max(jnp.abs(_blocks(x, block)), axis=-1)


@partial(jax.jit, static_argnums=(2, 3))
def _codes(x: Array, scales: Array, method: str, block: int) -> Array:
    """The codes of entries under scales of their blocks, two to a byte for 4 bits."""
    unit = _blocks(x, block) / jnp.maximum(scales, TINY)[..., None]
    unit = jnp.clip(unit, -1, 1).reshape(*x.shape[:-1], -1)
    if method == "int8":
        return jnp.round(unit * 127).astype(jnp.int8)
    middle = jnp.asarray((NF4[1:] + NF4[:-1]) / 2)
    four = jnp.searchsorted(middle, unit) if method == "nf4" else jnp.round(unit * 7) + 8
    four = four.astype(jnp.uint8)
    return (four[..., 0::2] << 4) | four[..., 1::2]


def encode(x: Array, method: str, block: int, double: bool) -> Quantised:
    """Quantise one float array of at least one axis; `quantize` says what each argument is."""
    block = min(block, x.shape[-1] + x.shape[-1] % 2)
    scales = stored = _largest(x, block)
    log_least = log_step = None
    if double:
        codes_of_scales, least, step = encode_scales(scales)
        if not _too_wide(scales, step):
            stored, log_least, log_step = codes_of_scales, least, step
            scales = decode_scales(stored, least, step)
    return Quantised(
        codes=_codes(x, scales, method, block),
        scales=stored,
        log_least=log_least,
        log_step=log_step,
        shape=tuple(x.shape),
        dtype=x.dtype,
        method=method,
        block=block,
    )


def quantize(base: Any, patterns: Sequence[str], method: str = "nf4", *, block: int = 64, double: bool = True) -> Any:
    """Keep the matching parameters of a base in 8 or 4 bits; `lk.adapt` restores them where it uses them.

    The factors stay as they are and learn what rounding took away (QLoRA, arXiv 2305.14314). A 4-bit entry takes
    0.5 bytes and its share of a scale: 1 / 64 byte with double quantisation, 4 / 64 without.

    Args:
      base: params, or the base of `lk.split`; not changed.
      patterns: of the paths to quantise, as in `lk.Spec`; each must match a float array of at least two axes.
      method: "int8", "int4" (both symmetric) or "nf4".
      block: entries along the last axis that share a scale; fewer where that axis is shorter.
      double: keep the scales in 8 bits, too: a logarithmic code, its range two fp32 numbers per matrix. Where scales
        differ so much (by more than 1e13) that a code would round them by an eighth, they stay in fp32.

    Returns:
      The same tree with `Quantised` leaves. `lk.adapt`, `lk.merge` and adapters take it as a base.

    Raises:
      PlanError: an unknown method, a pattern that matches nothing, a parameter that is not a float matrix.

    Example:
      >>> base = quantize({"w": jnp.ones((64, 128))}, ["w"], "int8", double=False)
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
        if deleted(x):
            raise PlanError(f"the buffer of {path!r} was deleted: it was donated to a function.\n  load it again")
        known = not isinstance(x, jax.core.Tracer)
        if known and not all_finite(x):
            raise PlanError(f"{path!r} holds values that are not finite; they would spoil the scales of others.")
        if known and x.dtype.itemsize > 4 and _leaves_fp32(x):
            raise PlanError(f"{path!r} holds values of float64 that float32 does not: scales are kept in it.")
        out[path] = encode(jnp.asarray(x), method, block, double)
    return unflatten(out, treedef)
