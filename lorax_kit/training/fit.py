"""A fit loop in the style Keras users know: epochs, a progress bar, validation, early stop, metrics as JSONL."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lorax_kit.core.errors import LoraxError
from lorax_kit.core.paths import Params, flatten, is_array
from lorax_kit.training.objective import is_key
from lorax_kit.training.step import State, Step


class Fitted(NamedTuple):
    """The state to use, and what happened.

    Attributes:
      state: of the best epoch if validation ran, else of the last.
      history: one dict per epoch: epoch, steps, seconds, loss, accuracy, val_loss, val_accuracy as far as known.
      stopped: why training ended: "epochs", "early stop", or "loss is not finite at step N".
    """

    state: State
    history: list[dict[str, float]]
    stopped: str


Evaluate = Callable[[Any], dict[str, float]]


@dataclass
class _Running:
    """Means of an epoch so far, without waiting for the device at every step."""

    totals: dict[str, Any] = field(default_factory=dict)
    steps: int = 0

    def add(self, values: dict[str, Any]) -> None:
        self.steps += 1
        for name, x in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + jnp.asarray(x, jnp.float32)

    def means(self) -> dict[str, float]:
        return {name: float(total) / self.steps for name, total in self.totals.items()}


def _placed(x: np.ndarray, like: Any) -> Any:
    """Where another array lies: a step over a mesh has the state on all devices."""
    return jax.device_put(x, like.sharding) if isinstance(like, jax.Array) else jnp.asarray(x)


def _scalars(aux: Any) -> dict[str, Any]:
    """The numbers among a step's aux, by name; of a nested dict as "group/name"."""
    if not isinstance(aux, dict):
        return {}
    named, _ = flatten(aux)
    return {name: x for name, x in named.items() if is_array(x) and x.ndim == 0 and not is_key(x)}


def fit(
    step: Step,
    state: State,
    base: Params,
    epochs: Sequence[Iterable[Any]],
    *,
    evaluate: Evaluate | None = None,
    patience: int | None = None,
    monitor: str = "val_loss",
    log: str | Path | None = None,
    progress: bool = True,
    around: tuple[int, int] = (0, 0),
) -> Fitted:
    """Train for some epochs.

    Args:
      step: from `make_step`, `sharded_step` or `pmap_step`. If its `info.aux` is a dict, the means of the scalars in
        it ("accuracy", say) are shown, those of a nested dict as "group/accuracy"; other leaves are not numbers of an
        epoch, and are left out.
      state: from `init`; donated, use the one returned.
      base: the frozen params.
      epochs: one iterable of batches per epoch.
      evaluate: factors -> metrics, called after every epoch; names get the prefix "val_".
      patience: stop after so many epochs without a better `monitor`; the best state is returned.
      monitor: a metric of the history; names with "loss" are better when lower, others when higher.
      log: append one JSON object per epoch to this file.
      progress: draw a bar per epoch.
      around: how many epochs of a longer training came before these and come after them; their numbers count on.

    Raises:
      LoraxError: no epochs, an epoch without batches, `patience` without `evaluate`, an unknown `monitor`.

    A loss that is not finite ends training with the best state so far (else the last finite one); `stopped`
    names the step.
    """
    if not epochs:
        raise LoraxError("there are no epochs to train.")
    if patience is not None and evaluate is None and monitor.startswith("val_"):
        raise LoraxError(f"patience watches {monitor!r}, but there is no `evaluate` to measure it.")
    history: list[dict[str, float]] = []
    best: tuple[float, Any] | None = None
    waited, stopped = 0, "epochs"
    sign = 1.0 if "loss" in monitor else -1.0
    last = around[0] + len(epochs) + around[1]
    for number, batches in enumerate(epochs, around[0] + 1):
        began = time.perf_counter()
        running = _Running()
        bar = tqdm(batches, desc=f"Epoch {number}/{last}", disable=not progress, unit="step", leave=True)
        failed = None
        for batch in bar:
            state, info = step(state, base, batch)
            running.add({"loss": info.loss, **_scalars(info.aux)})
            # Waiting for the step costs little where it is long, and a NaN is caught where it happens.
            if not bool(info.finite):
                failed = int(state.step)
                break
            bar.set_postfix({name: f"{x:.4f}" for name, x in running.means().items()})
        if running.steps == 0:
            raise LoraxError(f"epoch {number} has no batches: is the data set empty, or smaller than a batch?")
        if failed is not None:
            stopped = f"loss is not finite at step {failed}"
            bar.close()
            break
        row = {"epoch": number, "steps": int(state.step), **running.means()}
        if evaluate is not None:
            row.update({f"val_{name}": float(x) for name, x in evaluate(state.factors).items()})
        row["seconds"] = time.perf_counter() - began
        history.append(row)
        if progress:
            shown = [f"{k}: {v:.4f}" for k, v in row.items() if k not in ("epoch", "steps", "seconds")]
            tqdm.write(f"Epoch {number}/{last} - {row['seconds']:.0f}s - {' - '.join(shown)}", file=sys.stderr)
        if log is not None:
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if evaluate is not None or patience is not None:
            if monitor not in row:
                raise LoraxError(f"monitor {monitor!r} is not measured; there are {', '.join(row)}.")
            score = sign * row[monitor] if math.isfinite(row[monitor]) else math.inf
            if (best is None and score < math.inf) or (best is not None and score < best[0]):
                best, waited = (score, jax.tree.map(np.asarray, state.factors)), 0
            else:
                waited += 1
                if patience is not None and waited >= patience:
                    stopped = "early stop"
                    break
    if best is not None:
        state = state._replace(factors=jax.tree.map(_placed, best[1], state.factors))
    return Fitted(state, history, stopped)
