"""What a study trains on, whether it is run or planned only."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.sharding import Mesh

from lorax_kit.arrays.placement import TRIAL
from lorax_kit.checkpoint.agreed import told
from lorax_kit.errors import StudyError
from lorax_kit.processes import several
from lorax_kit.study.programs.groups import available_bytes
from lorax_kit.study.running.cluster import Workers


class Machines(NamedTuple):
    """What a study trains on.

    Attributes:
      budget: bytes per device.
      devices: over which the trials of a group are spread.
      workers: that train groups at the same time.
    """

    budget: int
    devices: int = 1
    workers: int = 1


def team_of(workers: int | Workers | None) -> Workers | None:
    """The workers that a call names: a number of them, or `Workers`."""
    return workers if workers is None or isinstance(workers, Workers) else Workers(workers)


def machines_of(mesh: Mesh | None, workers: Workers | None, memory_bytes: int | None) -> Machines:
    """Where a study trains.

    Raises:
      StudyError: a mesh without the axis "trial" or not over all processes, workers beside a mesh or processes.
    """
    if workers is not None and (mesh is not None or several()):
        raise StudyError(
            "workers have devices of their own: they take neither a mesh nor several processes.\n"
            "  give workers= or mesh=, not both"
        )
    if several() and (mesh is None or mesh.devices.size < jax.device_count()):
        raise StudyError(
            f"there are {jax.process_count()} processes, and the mesh does not reach over the devices of all.\n"
            f"  mesh=lk.study_mesh(trials={jax.device_count()})"
        )
    if mesh is not None and TRIAL not in mesh.shape:
        raise StudyError(
            f"the mesh has the axes {', '.join(map(repr, mesh.shape))}; a study spreads trials over {TRIAL!r}.\n"
            f"  mesh=lk.device_mesh({TRIAL!r})"
        )
    count = 1 if workers is None else workers.count
    if memory_bytes is None:
        memory_bytes = told(lambda: available_bytes(jax.local_devices()[0]))
        if workers is not None and not workers.gpus:  # they share this machine's memory
            memory_bytes //= count
    return Machines(memory_bytes, 1 if mesh is None else mesh.shape[TRIAL], count)
