"""A limit of the memory that a training takes: told before it begins, and held while it runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax

from lorax_kit.core.specs.setting import shown
from lorax_kit.errors import LoraxError
from lorax_kit.measure import facts, held_memory, peak_memory, release_memory
from lorax_kit.problem.evaluate import form_of_batch
from lorax_kit.report.tables.text import bytes_text

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
WAYS_OUT = "--save-memory, --quantise nf4, a smaller --batch-size or --length"


def bytes_of(text: str) -> int:
    """Bytes of a size such as 3GiB, 800 MB, 1.5g or 100000; units are binary.

    Raises:
      LoraxError: no size.

    Example:
      >>> bytes_of("3GiB"), bytes_of("0.5 k")
      (3221225472, 512)
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b)?\s*", text, re.IGNORECASE)
    size = 0.0 if match is None else float(match[1]) * UNITS[match[2].lower()]
    if not 1 <= size < 2**63:
        raise LoraxError(f"{shown(text)} is no size of memory; give one such as 3GiB or 800MiB.")
    return int(size)


def within(step: Any, limit: int, state: Any, base: Any, batch: Any) -> Callable[[Any, Any, Any], Any]:
    """A training's step that takes no more than `limit` bytes, compiled for batches of this form.

    On a CPU they are of the process: what it holds already, and what XLA plans for the step. On an accelerator they
    are of the device: what XLA plans, the base and the state among it.

    Args:
      step: compiled by `jax.jit`, (state, base, batch) -> results.

    Returns:
      The same function, which raises as soon as the process has held more.

    Raises:
      LoraxError: it would take more.
    """
    compiled, form = step.lower(state, base, batch).compile(), form_of_batch(batch)
    release_memory()
    planned, held = facts(compiled), held_memory() if jax.default_backend() == "cpu" else None
    needed = planned["peak_bytes"] if held is None else held + planned["temp_bytes"] + planned["new_bytes"]
    if needed > limit:
        parts = f"{bytes_text(planned['temp_bytes'])} of a step's intermediate results"
        there = ", beside the base and the state" if held is None else f", and {bytes_text(held)} that are held already"
        raise LoraxError(
            f"training would take {bytes_text(needed)} of memory, and at most {bytes_text(limit)} are allowed: "
            f"{parts}{there}.\n  {WAYS_OUT}"
        )

    def run(state: Any, base: Any, batch: Any) -> Any:
        out = (compiled if form_of_batch(batch) == form else step)(state, base, batch)
        jax.block_until_ready(out)
        most = None if held is None else peak_memory()
        if most is not None and most > limit:
            raise LoraxError(
                f"training took {bytes_text(most)} of memory, and at most {bytes_text(limit)} are allowed.\n"
                f"  {WAYS_OUT}"
            )
        return out

    return run
