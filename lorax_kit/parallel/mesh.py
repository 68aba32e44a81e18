"""Meshes and shardings: the step data-parallel over devices, or the trials of a study spread over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorax_kit.core.errors import LoraxError
from lorax_kit.training.step import Init, Loss, Step, make_step

DATA = "data"
TRIAL = "trial"


def device_mesh(axis: str = DATA, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh over all devices, or the given ones: axis "data" for batches, "trial" for studies."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (axis,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The same arrays on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard(tree: Any, mesh: Mesh, axis: str = DATA) -> Any:
    """Split every array along its first axis over the mesh.

    Raises:
      LoraxError: a first axis that the devices do not divide.
    """
    n = mesh.shape[axis]
    for x in jax.tree_util.tree_leaves(tree):
        if x.ndim == 0 or x.shape[0] % n:
            raise LoraxError(f"an array of shape {x.shape} does not split over {n} devices along its first axis.")
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(axis)))


def sharded_step(
    loss_fn: Loss, tx: optax.GradientTransformation, mesh: Mesh, *, accumulate: int = 1
) -> tuple[Init, Step]:
    """`lk.make_step`, data-parallel over the mesh's "data" axis under `jit` with `NamedSharding`.

    State and base are replicated, batches are split along their first axis; the gradient's reduction over devices
    is what XLA derives from the mean in the loss. The returned step accepts host batches and places them; a base that
    lies on one device is copied at every step, so place it once: `replicate(base, mesh)`.
    """
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(DATA))
    init, step = make_step(loss_fn, tx, accumulate=accumulate, jit=False)
    compiled: Callable[..., Any] = jax.jit(
        step, in_shardings=(whole, whole, split), out_shardings=(whole, whole), donate_argnums=(0,)
    )

    def place(*args: Any, **kwargs: Any) -> Any:
        return replicate(init(*args, **kwargs), mesh)

    def run(state: Any, base: Any, batch: Any) -> Any:
        return compiled(state, base, shard(batch, mesh))

    return place, run
