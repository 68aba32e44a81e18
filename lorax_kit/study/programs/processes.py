"""Several processes of `jax.distributed`: one of them writes, all of them know what it found."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from lorax_kit.checkpoint.orbax_files import wait_for_all
from lorax_kit.core.paths import is_array
from lorax_kit.errors import LoraxError

Value = TypeVar("Value")


def several() -> bool:
    """Whether the program runs in several processes."""
    return jax.process_count() > 1


def is_writer() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def told(make: Callable[[], Value], error: type[LoraxError] = LoraxError) -> Value:
    """What the writer makes, in every process; where it raises, every process does.

    All processes must call it, in the same order. In a single process it is `make()`.

    Args:
      make: called in the writer alone; its result is pickled (between processes of one program).
      error: raised in the others where the writer's `make` raises.
    """
    if not several():
        return make()
    raised: BaseException | None = None
    sent: tuple[bool, Any] = (True, None)
    if is_writer():
        try:
            sent = (True, make())
        except Exception as e:  # whatever it is, the others must not wait for it
            raised, sent = e, (False, str(e))
    wait_for_all()  # what the writer does may take long
    ok, value = _broadcast(sent)
    if raised is not None:
        raise raised
    if not ok:
        raise error(f"process 0: {value}")
    return value  # type: ignore[no-any-return]


def _broadcast(value: Any) -> Any:
    data = np.frombuffer(pickle.dumps(value), np.uint8) if is_writer() else np.zeros(0, np.uint8)
    size = int(np.asarray(multihost_utils.broadcast_one_to_all(np.int64(data.size).astype(np.int32))))
    mine = data if is_writer() else np.zeros(size, np.uint8)
    return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8).tobytes())


def spread(tree: Any, sharding: Any) -> Any:
    """Arrays that every process has whole, on a mesh that may reach over several processes.

    Args:
      sharding: one for all leaves, or a tree of them.
    """
    if not several():
        return jax.device_put(tree, sharding)
    shardings = jax.tree.map(lambda _: sharding, tree) if isinstance(sharding, Sharding) else sharding
    return jax.tree.map(_spread, tree, shardings)


def _spread(x: Any, sharding: Any) -> Any:
    if is_array(x) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        impl, data = jax.random.key_impl(x), np.asarray(jax.random.key_data(x))
        return jax.jit(lambda d: jax.random.wrap_key_data(d, impl=impl), out_shardings=sharding)(
            _spread(data, sharding)
        )
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def gathered(tree: Any) -> Any:
    """The arrays of a tree as numpy, whole, in every process."""

    def one(x: Any) -> np.ndarray:
        if not several() or not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(one, tree)
