"""Sums over the inputs of a site: what `calibrate` adds up on the device, batch after batch."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.arrays.placement import alike, varies
from lorax_kit.core.method import Hints
from lorax_kit.core.site import Site
from lorax_kit.errors import CompressError
from lorax_kit.transform.trace import Given


class Sums(NamedTuple):
    """On the device: tokens (), second (S, K, K) or counts (V,), first (S, K) of |x|; arrays, or `jax.Ref`s of them."""

    tokens: Any
    second: Any
    first: Any


def zeros(site: Site) -> Sums:
    """The sums of a site before the first batch, fp32."""
    s, k = prod(site.stack_shape), prod(site.in_shape)
    if site.lookup:
        return Sums(jnp.zeros(()), jnp.zeros((k,)), jnp.zeros((0,)))
    return Sums(jnp.zeros(()), jnp.zeros((s, k, k)), jnp.zeros((s, k)))


def _over_devices(tree: Any, differs: frozenset[str]) -> Any:
    """Arrays summed over the devices of a `shard_map` that hold other inputs; one of those that hold the same."""

    def total(x: Array) -> Array:
        shared = tuple(sorted(varies(x) - differs))
        x = jax.lax.psum(x, tuple(sorted(varies(x) & differs))) if varies(x) & differs else x
        return jax.lax.pmax(x, shared) if shared else x

    return jax.tree.map(total, tree)


def count_rows(sums: Sums, rows: Array, counts: Array, differs: frozenset[str]) -> None:
    """Accumulate how often rows (M,) of a table were looked up, `counts` (M,) for each; rows outside of it are none."""
    rows, counts, empty = alike((rows, counts, jnp.zeros(sums.second.shape)))
    second, tokens = _over_devices((empty.at[rows].add(counts, mode="drop"), jnp.sum(counts)), differs)
    sums.second[...] += second
    sums.tokens[...] += tokens


def add_inputs(sums: Sums, x: Array, counts: Array, layer: Array | None, differs: frozenset[str]) -> None:
    """Accumulate the moments of x (*S, M, K).

    With `layer`, x (M, K) belongs to that matrix of the stack only, and its tokens count 1 / S. `counts` (*S, M) weighs
    the rows; a row of weight 0 may hold anything.
    """
    x, counts = alike((x, counts))
    x = x.astype(jnp.float32).reshape(-1, *x.shape[-2:])
    counts = counts.reshape(-1, x.shape[1], 1)
    x = jnp.where(counts > 0, x, 0)
    second = jnp.einsum("smi,smj->sij", counts * x, x, precision=jax.lax.Precision.HIGHEST)
    first, tokens = jnp.sum(counts * jnp.abs(x), axis=1), jnp.sum(counts) / counts.shape[0]
    second, first, tokens = _over_devices((second, first, tokens), differs)
    if layer is None:
        sums.second[...] += second
        sums.first[...] += first
        sums.tokens[...] += tokens
    else:
        sums.second[layer] += second[0]
        sums.first[layer] += first[0]
        sums.tokens[...] += tokens / sums.first.shape[0]


def counts_of(weights: Array | None, site: Site, given: Given, inside: bool) -> Array | str:
    """How much each row of the inputs counts, (*S, M), or (M,) of a lookup; or why it is not known.

    Args:
      weights: of a batch's inputs, whose axes lead those of the value that the site is given, or are flattened there
        into one. Where the value has one row for each of their first axis, as after pooling, a row counts as much as
        the input of it that counts most.
      inside: in the body of a loop or branch, where one row for each of the first axis may be one step's.
    """
    x, shape = given.value, given.inputs.shape if site.lookup else given.inputs.shape[:-1]
    if weights is None:
        return jnp.ones(shape)
    n, rows = weights.ndim, x.shape[:1] + (1,) * (x.ndim - 1)
    if x.ndim > n and x.shape[:n] == weights.shape:
        flags = weights.reshape(*weights.shape, *(1,) * (x.ndim - n))
    elif n > 1 and x.shape[0] == weights.size:
        flags = weights.reshape(rows)
    elif n > 1 and not inside and x.shape[0] == weights.shape[0] == prod(shape):
        flags = jnp.max(weights.reshape(weights.shape[0], -1), axis=1).reshape(rows)
    else:
        return f"which of its inputs count is not known: they are {x.shape}, the weights {weights.shape}"
    if not site.lookup:
        return jnp.max(given.arrange(jnp.broadcast_to(flags, x.shape)), axis=-1)
    if flags.size != prod(shape):
        return f"which of its {prod(shape)} lookups count is not known: the weights are {weights.shape}"
    return flags.reshape(-1)


def with_inputs(hints: Hints, site: Site, sums: Sums, skipped: str) -> Hints:
    """With the sums over the inputs of a site; `skipped` says why some uses of it were not summed.

    Raises:
      CompressError: no inputs, or not all of them.
    """
    tokens, second, first = (np.asarray(x, np.float64) for x in sums)
    way_out = "  leave it out of the plan, or give it a method or start that needs no data"
    if skipped and tokens > 0:
        raise CompressError(f"calibration knows some uses of {site.path!r}, but not all: {skipped}.\n{way_out}")
    if tokens == 0:
        why = skipped or "no batch led to a product or lookup of it, or none of weight above 0"
        raise CompressError(f"calibration never reached {site.path!r}: {why}.\n{way_out}")
    if site.lookup:
        return hints._replace(tokens=float(tokens), counts=second)
    return hints._replace(tokens=float(tokens), gram=second, absolute=first / float(tokens))
