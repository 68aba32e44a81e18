"""Meshes by what their axes split, and batches and whole trees on them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr

from lorax_kit.arrays.placement import DATA, FSDP, TENSOR, TRIAL
from lorax_kit.core.paths import is_array
from lorax_kit.core.specs.setting import is_int
from lorax_kit.errors import LoraxError
from lorax_kit.processes import spread


def device_mesh(axis: str = DATA, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh over all devices, or the given ones: axis "data" for batches, "trial" for studies."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (axis,))


def study_mesh(trials: int = 1, data: int = 1, devices: Sequence[jax.Device] | None = None, *, fsdp: int = 1) -> Mesh:
    """A mesh for `lk.run`: trials spread over an axis "trial", the examples of each batch over "data" and "fsdp".

    Args:
      trials, data: devices along each axis.
      devices: at least trials x data x fsdp of them; None: all.
      fsdp: devices that hold the base in parts.

    Raises:
      LoraxError: fewer devices.

    Example:
      >>> dict(study_mesh(trials=1, data=1).shape)
      {'trial': 1, 'data': 1, 'fsdp': 1}
    """
    return _mesh({TRIAL: trials, DATA: data, FSDP: fsdp}, devices)


def training_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh for `lk.sharded_step`: batches split over "data" and "fsdp", the base over "fsdp" and "tensor".

    Args:
      data, fsdp, tensor: devices along each axis. The fastest connections belong to "tensor", the last axis.
      devices: at least data x fsdp x tensor of them; None: all.

    Raises:
      LoraxError: fewer devices.

    Example:
      >>> dict(training_mesh().shape)
      {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    return _mesh({DATA: data, FSDP: fsdp, TENSOR: tensor}, devices)


def _mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None) -> Mesh:
    given = list(jax.devices() if devices is None else devices)
    shown = " x ".join(repr(n) for n in sizes.values())
    if not all(is_int(n) and n >= 1 for n in sizes.values()):
        raise LoraxError(f"a mesh of {shown} devices; all must be integers of at least 1.")
    needed = prod(sizes.values())
    if len(given) < needed:
        raise LoraxError(f"a mesh of {shown} devices needs {needed}; there are {len(given)}.")
    return Mesh(np.asarray(given[:needed]).reshape(*sizes.values()), tuple(sizes))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The same arrays on every device of the mesh, whose devices may be of several processes."""
    return spread(tree, NamedSharding(mesh, PartitionSpec()))


def shard(tree: Any, mesh: Mesh, axis: str | tuple[str, ...] = DATA, *, local: bool = False) -> Any:
    """Split every array along its first axis over the mesh; numbers and single random keys lie on every device.

    Args:
      tree: a batch; in several processes each has the whole of it.
      axis: of the mesh, or several.
      local: each process has its own rows alone, in the order of the processes.

    Raises:
      LoraxError: a first axis that the devices do not divide, or a leaf that is neither an array nor a number.
    """
    axes = (axis,) if isinstance(axis, str) else axis
    n, split, whole = (
        prod(mesh.shape[x] for x in axes),
        NamedSharding(mesh, PartitionSpec(axes)),
        NamedSharding(mesh, PartitionSpec()),
    )
    here = n // jax.process_count() if local else n

    def sharding(path: Any, x: Any) -> NamedSharding:
        if not is_array(x) and not isinstance(x, bool | int | float | complex):
            raise LoraxError(
                f"batch{keystr(path)} is a {type(x).__name__}; a batch holds arrays, numbers and random keys."
            )
        if np.ndim(x) and x.shape[0] % here:
            name = f"batch{keystr(path)}, an array of shape {x.shape},"
            raise LoraxError(f"{name} does not split over {here} devices along its first axis.")
        return split if np.ndim(x) else whole

    return spread(tree, jax.tree_util.tree_map_with_path(sharding, tree), local=local)
