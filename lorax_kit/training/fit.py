"""A fit loop in the style Keras users know: epochs, a progress bar, validation, early stop, metrics as JSONL."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lorax_kit.checkpoint.agreed import is_due
from lorax_kit.checkpoint.orbax_files import ready
from lorax_kit.core.paths import Params, flatten, is_array
from lorax_kit.errors import LoraxError
from lorax_kit.files.lines import append
from lorax_kit.files.staging import replace_file
from lorax_kit.json_text import parse_json, sealed_json
from lorax_kit.processes import gathered, is_shared, is_writer, lost_process_told, spread
from lorax_kit.training.compiled import watched
from lorax_kit.training.objective import is_key
from lorax_kit.training.saved import Saved, load_training, save_training
from lorax_kit.training.step import Info, State, Step

SAVE_SECONDS = 30.0


class Fitted(NamedTuple):
    """The state to use, and what happened.

    Attributes:
      state: of the best epoch if validation ran, else of the last.
      history: one dict per epoch: epoch, steps, seconds, loss, accuracy, val_loss, val_accuracy as far as known.
      stopped: why training ended: "epochs", "early stop", or "loss is not finite at step N" ("gradient", "update").
      best: the place in the history of the epoch that the state is of; None: nothing was chosen, it is the last.
    """

    state: State
    history: list[dict[str, float]]
    stopped: str
    best: int | None = None


LOSSES = {"loss": "lower", "val_loss": "lower"}
Evaluate = Callable[[Any], dict[str, float]]


def direction(metric: str, better: str | None, known: Mapping[str, str]) -> int:
    """Read which way a metric is better: 1 for "higher", -1 for "lower". Names are not guessed at.

    Args:
      better: what the caller says, or None.
      known: metrics of one meaning, and their direction.

    Raises:
      LoraxError: another word, one that contradicts `known`, or a metric of unknown direction.
    """
    if better is None and metric not in known:
        raise LoraxError(
            f"whether {metric!r} is better when higher or lower is not known.\n"
            "  say so: better='higher' or better='lower'"
        )
    if better is not None and better not in ("higher", "lower"):
        raise LoraxError(f"better is {better!r}; it must be 'higher' or 'lower'.")
    if better is not None and known.get(metric, better) != better:
        raise LoraxError(f"{metric!r} is better when {known[metric]}, and better is {better!r}.\n  leave it out")
    return 1 if (better or known[metric]) == "higher" else -1


@dataclass
class _Running:
    """Means of an epoch so far, without waiting for the device at every step."""

    totals: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0

    def add(self, values: dict[str, Any]) -> None:
        self.steps += 1
        for name, x in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + jnp.asarray(x, jnp.float32)

    def means(self) -> dict[str, float]:
        return {name: float(total) / self.steps for name, total in self.totals.items()}


def _placed(x: np.ndarray, like: Any) -> Any:
    """Where another array lies: a step over a mesh has the state on all devices."""
    return spread(x, like.sharding) if isinstance(like, jax.Array) else jnp.asarray(x)


def _scalars(aux: Any) -> dict[str, Any]:
    """The numbers among a step's aux, by name; of a nested dict as "group/name"."""
    if not isinstance(aux, dict):
        return {}
    named, _ = flatten(aux)
    return {name: x for name, x in named.items() if is_array(x) and x.ndim == 0 and not is_key(x)}


@lost_process_told()
def fit(
    step: Step,
    state: State,
    base: Params,
    epochs: Sequence[Iterable[Any]],
    *,
    evaluate: Evaluate | None = None,
    patience: int | None = None,
    monitor: str = "val_loss",
    better: str | None = None,
    log: str | Path | None = None,
    progress: bool = True,
    around: tuple[int, int] = (0, 0),
    saved: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
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
      patience: stop after so many epochs without a better one; the state of the best is returned.
      monitor: a metric of the history, which says which epoch is best; of those in which it is equal, the one of the
        lowest "val_loss", then the earliest.
      better: "lower" or "higher": when `monitor` is better. Only "loss" and "val_loss" need none: they are losses.
      log: append one JSON object per epoch to this file, sealed by its last key (see `lorax_kit.json_text`).
      progress: draw a bar per epoch.
      around: how many epochs of a longer training came before these and come after them; their numbers count on.
      saved: keep the training under way in this file, after every epoch and each half minute; where it is there, go on
        from it, to the same bits. Epochs and batches that are done are then skipped: each epoch's batches must begin by
        themselves. The file stays when training ends, to be deleted when its result is safe.
      settings: JSON data that say what is trained: a file of other settings is refused.

    Raises:
      LoraxError: a saved training that is damaged or another one; no epochs, an epoch without batches, `patience`
        without `evaluate`, an unknown `monitor`, or one without `better`.

    Warns where the step is compiled again, with the argument that changed: a last batch of another size, say.

    Of several processes all call this with the same batches (or their own rows, `sharded_step(local=True)`); process 0
    alone writes and shows.

    A loss that is not finite ends training with the best state so far (else the last finite one); `stopped`
    names the step.
    """
    ready()
    if not epochs:
        raise LoraxError("there are no epochs to train.")
    if patience is not None and evaluate is None and monitor.startswith("val_"):
        raise LoraxError(f"patience watches {monitor!r}, but there is no `evaluate` to measure it.")
    chosen = evaluate is not None or patience is not None
    sign = -direction(monitor, better, LOSSES) if chosen else 0
    about = {**(settings or {}), "epochs": len(epochs), "monitor": monitor, "patience": patience}
    file = None if saved is None else Path(saved)
    earlier = None if file is None else load_training(file, state, about)
    now = _UnderWay(Saved(state, []) if earlier is None else earlier, file, about)
    if not is_writer():
        log, progress = None, False
    if log is not None and earlier is not None:
        _complete(Path(log), now.history)
    step = watched(step)
    last = around[0] + len(epochs) + around[1]
    for number, batches in enumerate(epochs, around[0] + 1):
        if now.stopped is not None:
            break
        if number - around[0] <= len(now.history):
            continue
        running, began = now.begun(), time.perf_counter()
        began -= running.seconds
        failed = _train_epoch(step, base, batches, now, running, f"Epoch {number}/{last}", progress)
        if running.steps == 0:
            raise LoraxError(f"epoch {number} has no batches: is the data set empty, or smaller than a batch?")
        if failed is not None:
            now.stopped = failed
            now.keep(_Running())
            break
        row = {"epoch": number, "steps": int(now.state.step), **running.means()}
        if evaluate is not None:
            now.keep(running)  # validation may take long, too
            row.update({f"val_{name}": float(x) for name, x in evaluate(now.state.factors).items()})
        row["seconds"] = time.perf_counter() - began
        now.history.append(row)
        if progress:
            shown = [f"{k}: {v:.4f}" for k, v in row.items() if k not in ("epoch", "steps", "seconds")]
            tqdm.write(f"Epoch {number}/{last} - {row['seconds']:.0f}s - {' - '.join(shown)}", file=sys.stderr)
        if chosen:
            now.choose(monitor, sign, patience)
        now.keep(_Running())
        if log is not None:
            append(Path(log), sealed_json(row) + "\n")
    state, best = now.state, now.best
    if best is not None:
        state = state._replace(factors=jax.tree.map(_placed, best[1], state.factors))
    return Fitted(state, now.history, now.stopped or "epochs", None if best is None else best[0])


class _UnderWay:
    """A training and the file that keeps it.

    Attributes:
      state, history, best, waited, stopped: as in `Saved`.
    """

    def __init__(self, saved: Saved, file: Path | None, about: Mapping[str, Any]) -> None:
        self.state, self.history, self.best = saved.state, saved.history, saved.best
        self.waited, self.stopped, self._file, self._about = saved.waited, saved.stopped, file, about
        self._left: _Running | None = _Running(dict(saved.totals), saved.steps, saved.seconds)

    def begun(self) -> _Running:
        """What is done of the next epoch."""
        running, self._left = self._left or _Running(), None
        return running

    def keep(self, running: _Running) -> None:
        """Write it, with what is done of an epoch."""
        if self._file is not None:
            one = Saved(
                self.state, self.history, self.best, self.waited, running.totals, running.steps, running.seconds,
                self.stopped,
            )  # fmt: skip
            save_training(self._file, one, self._about)

    def keep_if_due(self, running: _Running, kept: float) -> float:
        """Write it where that is half a minute ago; the second of the epoch in which it was written last."""
        if self._file is None or not is_due(running.seconds - kept, SAVE_SECONDS, running.steps, is_shared(self.state)):
            return kept
        self.keep(running)
        return running.seconds

    def choose(self, monitor: str, sign: int, patience: int | None) -> None:
        """Hold the state of the epoch just measured if it is the best, and stop where none was for `patience`."""
        row = self.history[-1]
        if monitor not in row:
            raise LoraxError(f"monitor {monitor!r} is not measured; there are {', '.join(row)}.")
        order = _order(row, monitor, sign)
        best = self.best is None or order < _order(self.history[self.best[0]], monitor, sign)
        if math.isfinite(order[0]) and best:
            self.best, self.waited = (len(self.history) - 1, gathered(self.state.factors)), 0
            return
        self.waited += 1
        if patience is not None and self.waited >= patience:
            self.stopped = "early stop"


def _train_epoch(
    step: Step, base: Params, batches: Iterable[Any], now: _UnderWay, running: _Running, name: str, progress: bool
) -> str | None:
    """Take the steps of an epoch that are left; what is not finite and at which step, or None."""
    kept, began = running.seconds, time.perf_counter() - running.seconds
    bar = tqdm(
        itertools.islice(batches, running.steps, None), desc=name, unit="step", disable=None if progress else True,
        leave=True, initial=running.steps, total=len(batches) if isinstance(batches, Sized) else None,
    )  # fmt: skip
    for batch in bar:
        now.state, info = step(now.state, base, batch)
        running.add({"loss": info.loss, **_scalars(info.aux)})
        # Waiting for the step costs little where it is long, and a NaN is caught where it happens.
        if not bool(info.finite):
            bar.close()
            return f"{_odd(info)} is not finite at step {int(now.state.step)}"
        bar.set_postfix({name: f"{x:.4f}" for name, x in running.means().items()})
        running.seconds = time.perf_counter() - began
        kept = now.keep_if_due(running, kept)
    return None


def _order(row: Mapping[str, float], monitor: str, sign: int) -> tuple[float, float]:
    """What puts the best epoch first: the metric, and where two have the same, their loss of validation."""
    order = (sign * row[monitor], row.get("val_loss", 0.0))
    return tuple(x if math.isfinite(x) else math.inf for x in order)  # type: ignore[return-value]


def _odd(info: Info) -> str:
    """What of a step is not finite."""
    if not bool(jnp.isfinite(info.loss)):
        return "loss"
    return "update" if bool(jnp.isfinite(info.grad_norm)) else "gradient"


def _complete(log: Path, history: Sequence[Mapping[str, float]]) -> None:
    """End a log with the rows of `history`: a kill may have cut the last line, or come before it was written."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    held = [row for line in whole if (row := _row(line)) is not None]
    missing = [sealed_json(dict(row)) + "\n" for row in history if dict(row) not in held]
    replace_file(log, "".join([*whole, *missing]).encode())


def _row(line: str) -> Any:
    """What a line of a log says; None where it is damaged."""
    try:
        return parse_json(line)
    except ValueError:
        return None
