"""How much memory a pack of trials needs, estimated before anything is compiled, and packs that fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lorax_kit.core.errors import StudyError
from lorax_kit.core.paths import nbytes


def tree_bytes(tree: Any) -> int:
    """Bytes of every array of a tree (or of shapes standing for them)."""
    return sum(nbytes(x.shape, x.dtype) for x in jax.tree_util.tree_leaves(tree) if hasattr(x, "dtype"))


def estimate(loss: Callable[[Any], Any], factors: Any) -> int:
    """Peak bytes of one training step of a pack beyond the base.

    What the backward pass keeps is exactly what `jax.vjp` closes over, read here from shapes alone; to it come
    the factors, their gradients, and two moments. Buffers that the compiler fuses away are counted, the
    workspace of single operations is not.

    Args:
      loss: factors of the pack -> any array (one loss per trial).
      factors: stacked factors, or shapes standing for them.
    """
    residuals = jax.eval_shape(lambda f: jax.vjp(loss, f)[1], factors)
    return tree_bytes(residuals) + 4 * tree_bytes(factors)


def available_bytes(device: jax.Device) -> int:
    """Memory that a study may plan with: what the device reports free, or 60 % of the host's available memory."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    return int(0.6 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def group_size(one: int, two: int, trials: int, budget: int, devices: int = 1) -> int:
    """The size of equal groups of `trials` that fit `budget` bytes per device, from the estimates of one and two.

    A pack of n is estimated at fixed + n * slope. Groups are balanced: 15 trials that fit by 8 run as 8 and 7.

    Raises:
      StudyError: not even one trial fits.
    """
    slope = max(two - one, 1)
    fixed = max(one - slope, 0)
    if fixed + slope > budget:
        raise StudyError(
            f"one trial needs about {(fixed + slope) / 2**20:.0f} MiB, the budget is {budget / 2**20:.0f} MiB.\n"
            "  use a smaller batch, shorter inputs or lower ranks, or raise the budget (memory=)"
        )
    most = min((budget - fixed) // slope * devices, trials)
    groups = -(-trials // most)
    size = -(-trials // groups)
    return min(-(-size // devices) * devices, max(most // devices * devices, devices))


def balanced(trials: Sequence[Any], size: int) -> list[list[Any]]:
    """Consecutive groups of at most `size`."""
    return [list(trials[i : i + size]) for i in range(0, len(trials), size)]
