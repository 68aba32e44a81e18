"""A thin `pmap` entrance to the same step, for code bases that have not left it.

`jax.pmap` is in maintenance mode; `sharded_step` is the main road, and a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax

from lorax_kit.core.errors import LoraxError
from lorax_kit.parallel.mesh import device_mesh, replicate
from lorax_kit.training.step import Init, Loss, Step, make_step

AXIS = "devices"


def pmap_step(
    loss_fn: Loss,
    tx: optax.GradientTransformation,
    *,
    devices: Sequence[jax.Device] | None = None,
    accumulate: int = 1,
) -> tuple[Init, Step]:
    """`lk.make_step` under `pmap`: the batch is split over devices, loss and gradients are averaged.

    State and base keep their plain shapes: `init` replicates the state, and every step broadcasts the base, unless
    `replicate(base, device_mesh("devices", devices))` has placed it once. The signature is that of `make_step`.

    Loss and gradients are means over devices: exact for losses that weigh every example alike, while a mean over
    weights that differ between devices is what `sharded_step` computes.

    Raises:
      LoraxError: when called with a batch that the devices do not divide.
    """
    chosen = list(jax.local_devices() if devices is None else devices)
    mesh = device_mesh(AXIS, chosen)
    n = len(chosen)
    init, step = make_step(loss_fn, tx, accumulate=accumulate, axis_name=AXIS, jit=False)
    mapped = jax.pmap(step, AXIS, in_axes=(None, None, 0), out_axes=None, devices=chosen)

    def split(x: Any) -> Any:
        if x.shape[0] % n:
            raise LoraxError(f"a batch of {x.shape[0]} does not split over {n} devices.")
        return x.reshape(n, x.shape[0] // n, *x.shape[1:])

    def place(*args: Any, **kwargs: Any) -> Any:
        # Where the mapped step returns it: otherwise the second call would be traced again.
        return replicate(init(*args, **kwargs), mesh)

    def run(state: Any, base: Any, batch: Any) -> Any:
        return mapped(state, base, jax.tree.map(split, batch))

    return place, run
