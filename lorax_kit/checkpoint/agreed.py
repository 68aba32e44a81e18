"""What one of several processes makes, known to all of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from jax.experimental import multihost_utils

from lorax_kit.checkpoint.orbax_files import wait_for_all
from lorax_kit.errors import LoraxError
from lorax_kit.processes import is_writer, several

Value = TypeVar("Value")


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


def is_due(seconds: float, limit: float, step: int, together: bool) -> bool:
    """Whether so many seconds are over the limit; processes that work together agree on it, every tenth step."""
    if not together:
        return seconds > limit
    return step % 10 == 0 and told(lambda: seconds > limit)


def _broadcast(value: Any) -> Any:
    data = np.frombuffer(pickle.dumps(value), np.uint8) if is_writer() else np.zeros(0, np.uint8)
    size = int(np.asarray(multihost_utils.broadcast_one_to_all(np.int64(data.size).astype(np.int32))))
    mine = data if is_writer() else np.zeros(size, np.uint8)
    return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8).tobytes())
