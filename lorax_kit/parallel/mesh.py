"""Meshes and shardings: the step data-parallel over devices, or the trials of a study spread over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr

from lorax_kit.core.paths import is_array
from lorax_kit.core.setting import is_int
from lorax_kit.errors import LoraxError
from lorax_kit.training.step import Init, Loss, Step, make_step

DATA = "data"
TRIAL = "trial"


def device_mesh(axis: str = DATA, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh over all devices, or the given ones: axis "data" for batches, "trial" for studies."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (axis,))


def study_mesh(trials: int = 1, data: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh for `lk.run`: trials spread over an axis "trial", the examples of each batch over an axis "data".

    Args:
      trials, data: devices along each axis.
      devices: at least trials x data of them; None: all.

    Raises:
      LoraxError: fewer devices.

    Example:
      >>> dict(study_mesh(trials=1, data=1).shape)
      {'trial': 1, 'data': 1}
    """
    given = list(jax.devices() if devices is None else devices)
    if not (is_int(trials) and is_int(data) and trials >= 1 and data >= 1):
        raise LoraxError(f"a mesh of {trials!r} x {data!r} devices; both must be integers of at least 1.")
    if len(given) < trials * data:
        raise LoraxError(f"a mesh of {trials} x {data} devices needs {trials * data}; there are {len(given)}.")
    return Mesh(np.asarray(given[: trials * data]).reshape(trials, data), (TRIAL, DATA))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The same arrays on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard(tree: Any, mesh: Mesh, axis: str = DATA) -> Any:
    """Split every array along its first axis over the mesh; numbers and single random keys lie on every device.

    Raises:
      LoraxError: a first axis that the devices do not divide, or a leaf that is neither an array nor a number.
    """
    n, split, whole = mesh.shape[axis], NamedSharding(mesh, PartitionSpec(axis)), NamedSharding(mesh, PartitionSpec())

    def sharding(path: Any, x: Any) -> NamedSharding:
        if not is_array(x) and not isinstance(x, bool | int | float | complex):
            raise LoraxError(
                f"batch{keystr(path)} is a {type(x).__name__}; a batch holds arrays, numbers and random keys."
            )
        if np.ndim(x) and x.shape[0] % n:
            name = f"batch{keystr(path)}, an array of shape {x.shape},"
            raise LoraxError(f"{name} does not split over {n} devices along its first axis.")
        return split if np.ndim(x) else whole

    return jax.device_put(tree, jax.tree_util.tree_map_with_path(sharding, tree))


def sharded_step(
    loss_fn: Loss, tx: optax.GradientTransformation, mesh: Mesh, *, axis: str | None = None, accumulate: int = 1
) -> tuple[Init, Step]:
    """`lk.make_step`, data-parallel over an axis of the mesh under `jit` with `NamedSharding`.

    State and base are replicated, batches are split along their first axis; the gradient's reduction over devices
    is what XLA derives from the mean in the loss. The returned step accepts host batches and places them; a base that
    lies on one device is copied at every step, so place it once: `replicate(base, mesh)`.

    Args:
      loss_fn, tx, accumulate: as for `lk.make_step`.
      mesh: of any number of axes.
      axis: the one that splits batches. Default: "data", or the only one.

    Raises:
      LoraxError: the mesh has no such axis; when called with a batch that the devices do not divide.
    """
    names = tuple(mesh.axis_names)
    if axis is None:
        axis = names[0] if len(names) == 1 else DATA
    if axis not in names:
        raise LoraxError(
            f"the mesh has the axes {', '.join(map(repr, names))}, and none is {axis!r}.\n"
            f"  say which splits the batch: sharded_step(..., axis={names[0]!r})"
        )
    over = axis
    whole = NamedSharding(mesh, PartitionSpec())
    init, step = make_step(loss_fn, tx, accumulate=accumulate, jit=False)
    compiled: Callable[..., Any] = jax.jit(
        step, in_shardings=(whole, whole, None), out_shardings=(whole, whole), donate_argnums=(0,)
    )

    def place(*args: Any, **kwargs: Any) -> Any:
        return replicate(init(*args, **kwargs), mesh)

    def run(state: Any, base: Any, batch: Any) -> Any:
        return compiled(state, base, shard(batch, mesh, over))

    return place, run
