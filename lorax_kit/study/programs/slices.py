"""How the trials of a pack are laid over devices and over time: side by side, or slice after slice in one program.

A step over all trials at once holds the activations of all of them. A CPU's caches hold those of a few: on two cores
24 trials of a 384-wide encoder take 135 to 180 ms each at once, and 88 two at a time, in a tenth of the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Layout(NamedTuple):
    """Where the trials of a pack are computed.

    Attributes:
      size: trials of the pack.
      at_once: of a device, side by side; the next follow when they are done.
      devices: over which those of a slice are spread.
    """

    size: int
    at_once: int
    devices: int = 1

    @property
    def width(self) -> int:
        """Trials of a slice, over all devices."""
        return self.at_once * self.devices

    @property
    def slices(self) -> int:
        """How many follow each other."""
        return self.size // self.width

    def needed(self, trials: int) -> int:
        """Slices that hold the first so many trials."""
        return -(-trials // self.width)

    def fold(self, tree: Any) -> Any:
        """(size, ...) -> (slices, width, ...), of every leaf."""
        return jax.tree.map(lambda x: x.reshape(self.slices, self.width, *x.shape[1:]), tree)

    def unfold(self, tree: Any) -> Any:
        """The inverse of `fold`."""
        return jax.tree.map(lambda x: x.reshape(self.size, *x.shape[2:]), tree)


def laid_out(trials: int, most: int, at_once: int, devices: int = 1) -> Layout:
    """The layout of equal packs for `trials`, at most `most` of them per device in a pack, `at_once` in a slice.

    Of the widths from half of `at_once` on that which leaves the fewest places empty, then the widest.
    """
    each = -(-trials // devices)
    each = -(-each // -(-each // most))
    widest = min(at_once, each)
    sizes = {width: -(-each // width) * width for width in range(widest, 0, -1)}
    fitting = [width for width, size in sizes.items() if size <= most]
    width = min(fitting, key=lambda width: (2 * width < widest, sizes[width], -width))
    return Layout(sizes[width] * devices, width, devices)


def in_slices(
    step: Callable[..., tuple[Any, Any]], layout: Layout
) -> Callable[[Any, Any, tuple[Any, ...], Array], tuple[Any, Any]]:
    """Apply a function of stacked trials to one slice of them after the other.

    Args:
      step: (state, read, *shared) -> (state, found); every leaf of state, read and found has a leading trial axis, of
        `layout.width`.

    Returns:
      (state, read, shared, count) -> (state, found), folded by `layout`. Slices from `count` on are left as they are,
      and zeros are found there. A donated state is updated in place.
    """

    def run(state: Any, read: Any, shared: tuple[Any, ...], count: Array) -> tuple[Any, Any]:
        if layout.slices == 1:
            out = step(*jax.tree.map(lambda x: x[0], (state, read)), *shared)
            return jax.tree.map(lambda x: x[None], out)
        shapes = jax.eval_shape(step, *jax.tree.map(lambda x: x[0], (state, read)), *shared)[1]
        empty = jax.tree.map(lambda s: jnp.zeros((layout.slices, *s.shape), s.dtype), shapes)

        def one(i: Array, whole: tuple[Any, Any]) -> tuple[Any, Any]:
            own = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), (whole[0], read))
            new = step(*own, *shared)
            return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0), whole, new)

        return lax.fori_loop(0, count, one, (state, empty))

    return run
