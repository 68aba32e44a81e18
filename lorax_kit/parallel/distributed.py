"""One program of several processes, by `jax.distributed`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from lorax_kit.errors import LoraxError

LOST_AFTER = 60
"""Seconds."""


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    lost_after: int = LOST_AFTER,
) -> None:
    """Make this process one of several; call it before anything else asks JAX for devices.

    Under Slurm, Open MPI, on a TPU pod or in Kubernetes JAX finds the others itself: no argument is needed.

    Args:
      coordinator: "HOST:PORT" of process 0, that all can reach.
      processes, process: how many, and which one of them this is.
      lost_after: seconds without a sign of life after which a process counts as lost. The others then end, too, and say
        so, instead of waiting for it: what they kept is gone on with when all are started anew.

    Raises:
      LoraxError: some of the three are missing, or the others cannot be found.
    """
    given = (coordinator, processes, process)
    if any(x is None for x in given) and any(x is not None for x in given):
        raise LoraxError(
            "coordinator, processes and process go together: all three, or none where a scheduler tells.\n"
            "  --coordinator HOST:PORT --processes N --process I"
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # read where the devices are CPUs
    bind = coordinator if coordinator is not None and coordinator.startswith("127.") else None
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            coordinator_bind_address=bind,
            heartbeat_timeout_seconds=lost_after,
        )
    except (RuntimeError, ValueError) as e:
        raise LoraxError(
            f"the processes did not come together: {e}\n"
            "  outside Slurm, Open MPI, TPU pods and Kubernetes: --coordinator HOST:PORT --processes N --process I"
        ) from None


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send what libraries write to stdout to stderr: gloo tells there which peers it has, amid a program's JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
