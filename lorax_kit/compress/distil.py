"""`distil`: a smaller model learns from a larger one, the baseline of every compression."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import Array
from tqdm import tqdm

from lorax_kit.compress.heal import _trained
from lorax_kit.core.errors import CompressError
from lorax_kit.core.paths import Params
from lorax_kit.core.spec import Full, Spec


def distil(
    fn: Callable[..., Any],
    params: Params,
    loss: Callable[[Any, Any], Array],
    batches: Iterable[Any],
    *,
    steps: int,
    lr: float = 1e-4,
    progress: bool = True,
) -> Params:
    """Train every parameter of a student; `distillation` makes the loss that follows a teacher.

    Args:
      fn: `fn(params, batch)`, the student.
      params: where it starts, such as some of the teacher's layers; not changed.
      loss: `loss(outputs, batch)`, a scalar.
      batches: as many as `steps`, or more.
      steps: of AdamW.
      lr: its peak rate, reached in a tenth of the steps and decaying to 0 as a cosine.
      progress: show a bar.

    Raises:
      CompressError: no steps, a rate that is no positive number, batches that end early, a loss that is not finite.
    """
    if steps < 1 or not 0 < lr < float("inf"):
        raise CompressError(f"steps is {steps!r} and lr {lr!r}; both must be positive.")
    with tqdm(total=steps, desc="distilling", unit="step", disable=not progress) as bar:
        return _trained(fn, params, Spec({"**": Full()}), loss, iter(batches), jax.random.key(0), steps, lr, bar)
