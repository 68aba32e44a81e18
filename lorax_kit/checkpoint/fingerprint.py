"""A fingerprint of the base: which frozen weights an adapter belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import jax
import numpy as np

from lorax_kit.core.paths import Params, flatten, is_array


def fingerprint(base: Params, trained_in_full: Collection[str] = ()) -> str:
    """SHA-256 over paths, shapes, dtypes and bytes of every frozen array, as a hex string.

    Args:
      base: params with concrete arrays.
      trained_in_full: paths to leave out: the adapter brings its own values for them.

    About 1 s per GiB of base.
    """
    digest = hashlib.sha256()
    named, _ = flatten(base)
    for path in sorted(named):
        leaf = named[path]
        if not is_array(leaf) or path in trained_in_full:
            continue
        # A quantised parameter is its codes and scales: another base than the array they came from.
        for part in jax.tree.leaves(leaf):
            array = np.ascontiguousarray(part)
            digest.update(f"{path}\0{array.shape}\0{array.dtype}\0".encode())
            digest.update(array.view(np.uint8).reshape(-1).data if array.size else b"")
    return digest.hexdigest()
