"""A fingerprint of the base: which frozen weights an adapter belongs to, and in what another base differs.

Random keys and counters are not weights: a forward pass advances them, and a model of the same weights has others. Nor
are running statistics, as far as Flax says that leaves are such (`nnx.BatchStat`, the collection "batch_stats").
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kit.core.paths import Params, flatten, is_array, is_state
from lorax_kit.core.quantised import Quantised
from lorax_kit.processes import gathered


def fingerprint(base: Params, trained_in_full: Collection[str] = ()) -> str:
    """SHA-256 over paths, shapes, dtypes and bytes of every frozen weight, as a hex string.

    Args:
      base: params with concrete arrays. Random keys, counters and running statistics are left out.
      trained_in_full: paths to leave out: the adapter brings its own values for them.

    About 1 s per GiB of base. Where that lies over several processes, all must call this: each array is gathered.
    """
    return _hash(base, {*trained_in_full, *statistics(base)})


def whole_fingerprint(tree: Any, left_out: Collection[str] = ()) -> str:
    """As `fingerprint`, of counters and statistics, too: of data, and of the bases of adapters that 0.1.0 saved."""
    return _hash(tree, left_out, counters=True)


def _hash(tree: Any, left_out: Collection[str], counters: bool = False) -> str:
    digest = hashlib.sha256()
    for path, leaf in _leaves(tree, counters):
        if path in left_out:
            continue
        # A quantised parameter is its codes and scales: another base than the array they came from.
        for array in _parts(leaf):
            digest.update(f"{path}\0{array.shape}\0{array.dtype}\0".encode())
            digest.update(_bytes(array))
    return digest.hexdigest()


def statistics(params: Params) -> frozenset[str]:
    """Paths of running statistics: leaves of Flax's `nnx.BatchStat`, or of its collection "batch_stats"."""

    def is_statistic(x: Any) -> bool:
        return any(kind.__name__ == "BatchStat" for kind in type(x).__mro__)

    named, _ = flatten(params)
    nodes = [p for p, x in flatten(params, whole=(), leaf=is_statistic)[0].items() if is_statistic(x)]
    prefixes = (*(f"{path}/" for path in nodes), "batch_stats/")
    return frozenset(path for path in named if path.startswith(prefixes))


def digests(base: Params, trained_in_full: Collection[str] = ()) -> dict[str, list[Any]]:
    """For each frozen leaf its dtype, its shape, its quantisation or "", and a checksum: plain data, kept by adapters.

    The checksum only tells which leaf differs where fingerprints do.
    """
    out: dict[str, list[Any]] = {}
    for path, leaf in _leaves(base):
        if path in trained_in_full:
            continue
        checksum = 0
        for array in _parts(leaf):
            checksum = zlib.crc32(_bytes(array), checksum)
        form = f"{leaf.method} in blocks of {leaf.block}" if isinstance(leaf, Quantised) else ""
        out[path] = [str(leaf.dtype), list(leaf.shape), form, f"{checksum:08x}"]
    return out


def differences(ours: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, str]:
    """Compare `digests` of a base with those that were stored of another: path -> a clause that names the path."""
    out = {}
    for path in sorted({*ours, *stored}):
        if path not in ours:
            out[path] = f"{path!r} is missing here"
        elif path not in stored:
            dtype, shape, _, _ = ours[path]
            out[path] = f"{path!r}, {dtype} of shape {tuple(shape)}, is not in its base"
        elif ours[path] != stored[path]:
            out[path] = _difference(path, ours[path], stored[path])
    return out


def _difference(path: str, ours: list[Any], theirs: list[Any]) -> str:
    for i, name in enumerate(("dtype", "shape", "form")):
        one, two = (tuple(x[i]) if name == "shape" else x[i] or "not quantised" for x in (ours, theirs))
        if one != two:
            return f"{path!r} {'is' if name == 'form' else f'has {name}'} {one} here, {two} in its base"
    return f"{path!r}, {ours[0]} of shape {tuple(ours[1])}, holds other values"


def first_difference(found: Mapping[str, str]) -> str:
    """The first of `differences`, and how many more there are."""
    more = f" (and {len(found) - 1} more differ)" if len(found) > 1 else ""
    return next(iter(found.values())) + more


def _leaves(tree: Any, counters: bool = False) -> Iterator[tuple[str, Any]]:
    named, _ = flatten(tree)
    for path in sorted(named):
        leaf = named[path]
        keys = is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if is_array(leaf) and not keys and (counters or not is_state(leaf)):
            yield path, leaf


def _parts(leaf: Any) -> list[np.ndarray]:
    return [np.ascontiguousarray(gathered(part)) for part in jax.tree.leaves(leaf)]


def _bytes(array: np.ndarray) -> Any:
    return array.view(np.uint8).reshape(-1).data if array.size else b""
