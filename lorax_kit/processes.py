"""Several processes of `jax.distributed`: which one writes, and arrays that lie over the devices of all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from lorax_kit.errors import ProcessLostError

LOST = re.compile(
    r"gloo .*(connection|read error|write error|timed out)|ncclRemoteError|coordination service|heartbeat",
    re.IGNORECASE,
)
"""In a line of the errors of XLA's programs and of JAX's coordination where another process is gone."""
OTHERS = ("RESOURCE_EXHAUSTED", "CpuCallback", "out of memory")
"""In errors that a process has alone, whatever else they tell."""


def several() -> bool:
    """Whether the program runs in several processes."""
    return jax.process_count() > 1


@contextmanager
def lost_process_told() -> Iterator[None]:
    """Say in words where a program of several processes fails because one of them is gone.

    Raises:
      ProcessLostError: in place of what the runtime raised.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        told = str(e)
        lost = next((line for line in told.splitlines() if LOST.search(line)), None)
        if lost is None or not several() or any(word in told for word in OTHERS):
            raise
        raise ProcessLostError(
            f"another process of this program ended, or cannot be reached: {lost.strip()}\n"
            "  start all of them again: they go on from what was kept"
        ) from e


def is_writer() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def spread(tree: Any, sharding: Any, *, local: bool = False) -> Any:
    """Arrays that every process has whole, on a mesh that may reach over several processes.

    Args:
      sharding: one for all leaves, or a tree of them.
      local: of arrays that are split, each process has its own rows alone.
    """
    shardings = jax.tree.map(lambda _: sharding, tree) if isinstance(sharding, Sharding) else sharding
    if not several():
        return jax.tree.map(_placed, tree, shardings)
    return jax.tree.map(lambda x, at: _spread(x, at, local), tree, shardings)


def _placed(x: Any, sharding: Any) -> Any:
    """On the devices of one process: of a host array each device is given its part alone."""
    if isinstance(x, np.ndarray) and not sharding.is_fully_replicated:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    return jax.device_put(x, sharding)


def _spread(x: Any, sharding: Any, local: bool = False) -> Any:
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        impl, data = jax.random.key_impl(x), np.asarray(jax.random.key_data(x))
        return jax.jit(lambda d: jax.random.wrap_key_data(d, impl=impl), out_shardings=sharding)(
            _spread(data, sharding)
        )
    if isinstance(x, jax.Array) and not x.is_fully_addressable:  # it lies on such a mesh already
        return x if x.sharding == sharding else jax.jit(lambda y: y, out_shardings=sharding)(x)
    whole = x if isinstance(x, np.ndarray) else np.asarray(x)
    if local and np.ndim(x):
        return jax.make_array_from_process_local_data(sharding, whole)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def is_shared(tree: Any) -> bool:
    """Whether an array of the tree lies on devices of several processes, all of which must then call what reads it."""
    return any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(tree))


def gathered(tree: Any) -> Any:
    """The arrays of a tree as numpy, whole, in every process.

    All processes must call it where an array lies over several, and is not whole on each.
    """

    def one(x: Any) -> np.ndarray:
        if not several() or not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(one, tree)
