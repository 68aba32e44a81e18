"""A thin `pmap` entrance to the same step, for code bases that have not left it.

`jax.pmap` is in maintenance mode; `sharded_step` is the main road, and a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorax_kit.errors import LoraxError
from lorax_kit.parallel.mesh import device_mesh, replicate
from lorax_kit.training.objective import folded, is_key, rows
from lorax_kit.training.step import Init, Loss, Step, make_step

AXIS = "devices"


def pmap_step(
    loss_fn: Loss,
    tx: optax.GradientTransformation,
    *,
    devices: Sequence[jax.Device] | None = None,
    accumulate: int = 1,
    loss_scale: float = 1.0,
) -> tuple[Init, Step]:
    """`lk.make_step` under `pmap`: the batch is split over devices, loss and gradients are averaged.

    State and base keep their plain shapes: `init` replicates the state, and every step broadcasts the base, unless
    `replicate(base, device_mesh("devices", devices))` has placed it once. The signature is that of `make_step`.

    Loss and gradients are means over devices: exact for losses that weigh every example alike, or that return
    `lk.Weighted`. Every array of the batch is split along its first axis; numbers reach every device as they are,
    random keys folded with the device's number, as the state's key is.

    Raises:
      LoraxError: when called with a batch that the devices do not divide.
    """
    chosen = list(jax.local_devices() if devices is None else devices)
    mesh = device_mesh(AXIS, chosen)
    n = len(chosen)
    init, step = make_step(loss_fn, tx, accumulate=accumulate, axis_name=AXIS, loss_scale=loss_scale, jit=False)
    mapped = jax.pmap(step, AXIS, in_axes=(None, None, 0), out_axes=None, devices=chosen)

    def split(batch: Any) -> Any:
        count = rows(batch, "pmap") or 0
        if count % n:
            raise LoraxError(f"a batch of {count} does not split over {n} devices.")

        def part(x: Any) -> Any:
            if jnp.ndim(x):
                return x.reshape(n, count // n, *x.shape[1:])
            return jax.vmap(partial(folded, x))(jnp.arange(n)) if is_key(x) else jnp.broadcast_to(jnp.asarray(x), (n,))

        return jax.tree.map(part, batch)

    def place(*args: Any, **kwargs: Any) -> Any:
        # Where the mapped step returns it: otherwise the second call would be traced again.
        return replicate(init(*args, **kwargs), mesh)

    def run(state: Any, base: Any, batch: Any) -> Any:
        return mapped(state, base, split(batch))

    return place, run
