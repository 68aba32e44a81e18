"""Arrays and a JSON document in one orbax checkpoint, by this process alone; and waiting for the other processes.

Orbax is imported by the first call, or by `ready`: that takes a fifth of a second, and many programs save nothing.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lorax_kit.errors import AdapterError

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

LONGEST_WAIT = 7 * 24 * 3600
"""Seconds that a process waits for the others; one that died is noticed before, by its missing heartbeat."""
_numbers = itertools.count()


@cache
def ready() -> dict[str, str]:
    """Import what writes an adapter; its versions, by name.

    A long training calls it when it begins: at its end the environment may have changed, or be out of reach.
    """
    import orbax.checkpoint  # noqa: F401

    return {name: version(name) for name in ("jax", "orbax-checkpoint")}


def write_files(path: Path, arrays: Mapping[str, np.ndarray], document: Mapping[str, Any]) -> None:
    """Make a folder of both."""
    import orbax.checkpoint as ocp

    with _quiet(), _waiting(path), _checkpointer() as checkpointer:
        items = ocp.args.Composite(factors=ocp.args.StandardSave(arrays), spec=ocp.args.JsonSave(document))
        checkpointer.save(path, items)


def read_json_item(path: Path) -> Any:
    """The document of a folder."""
    import orbax.checkpoint as ocp

    with _quiet(), _waiting(path), _checkpointer() as checkpointer:
        return checkpointer.restore(path, ocp.args.Composite(spec=ocp.args.JsonRestore()))["spec"]


def read_arrays(path: Path, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The arrays of a folder on this process's first device, uncommitted: they go where a base on a mesh lies."""
    import orbax.checkpoint as ocp

    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for n, x in shapes.items()}
    with _quiet(), _waiting(path), _checkpointer() as checkpointer:
        items = ocp.args.Composite(factors=ocp.args.StandardRestore(target))
        restored = checkpointer.restore(path, items)["factors"]
    return {name: jax.device_put(np.asarray(x)) for name, x in restored.items()}


def wait_for_all() -> None:
    """Wait until every process of the program is here; a collective of the devices would give up after seconds.

    All processes must call it as often as each other.
    """
    import orbax.checkpoint as ocp

    everyone = set(range(jax.process_count()))
    name = f"lorax_kit_{next(_numbers)}"
    ocp.multihost.sync_global_processes(name, processes=everyone, timeout=LONGEST_WAIT)


def _checkpointer() -> ocp.Checkpointer:
    """Of this process alone: orbax waits for every process of a program otherwise, and one writes an adapter."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"lorax_kit_{own}"
    )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
        factors=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        spec=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


@contextmanager
def _waiting(path: Path) -> Iterator[None]:
    """Orbax measures its waits by the wall clock: a jump of it ends them."""
    try:
        yield
    except TimeoutError:
        raise AdapterError(
            f"orbax gave up waiting for {str(path)!r}: the clock jumped, or the disk stands still.\n  call again"
        ) from None


class _quiet:
    """Orbax logs every save at INFO through absl; an adapter is small, and callers have their own progress."""

    def __enter__(self) -> None:
        self._level = logging.getLogger("absl").level
        logging.getLogger("absl").setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("absl").setLevel(self._level)
