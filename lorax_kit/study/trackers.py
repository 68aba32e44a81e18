"""Where a study's numbers go while it runs: any function of events, TensorBoard, Weights & Biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from lorax_kit.errors import StudyError
from lorax_kit.extras import need

Event = Mapping[str, Any]
"""What happened. "event" is one of

    "step"        "step" (from 1), "losses": trial -> loss
    "validation"  "step", "metrics": trial -> {name: value}
    "trial"       "row": the trial's row, as in `results.csv`
"""
Tracker = Callable[[Event], None]


def tensorboard(folder: str | Path) -> Tracker:
    """Write TensorBoard files: a run per trial, with its losses, validations and final metrics.

    Raises:
      StudyError: the package is not installed.

    Example:
      >>> track = tensorboard("runs/board")  # doctest: +SKIP
      >>> lk.run(study, problem, out="runs/study", trackers=[track])  # doctest: +SKIP
    """
    need("track", "tensorboard", raises=StudyError)
    from tensorboard.summary import Writer

    writers: dict[str, Any] = {}

    def write(trial: str, name: str, value: float, step: int) -> None:
        if trial not in writers:
            writers[trial] = Writer(str(Path(folder) / trial))
        writers[trial].add_scalar(name, value, step)

    def track(event: Event) -> None:
        if event["event"] == "step":
            for trial, loss in event["losses"].items():
                write(trial, "train/loss", loss, event["step"])
        elif event["event"] == "validation":
            for trial, metrics in event["metrics"].items():
                for name, value in metrics.items():
                    write(trial, f"val/{name}", value, event["step"])
        elif event["event"] == "trial":
            row = event["row"]
            for name, value in _final(row).items():
                write(row["trial"], f"final/{name}", value, row["steps"])
            writers.pop(row["trial"]).close() if row["trial"] in writers else None

    return track


def wandb(project: str, folder: str | Path = ".", *, mode: Literal["offline", "online"] = "offline") -> Tracker:
    """Log a Weights & Biases run per trial, when the trial ends: its settings, curves and final metrics.

    Args:
      project: its name.
      folder: where runs are kept; `wandb sync` sends those of mode "offline".
      mode: "offline" or "online".

    Raises:
      StudyError: the package is not installed.
    """
    need("track", "wandb", raises=StudyError)
    import wandb as library

    curves: dict[str, dict[int, dict[str, float]]] = {}

    def track(event: Event) -> None:
        if event["event"] == "step":
            for trial, loss in event["losses"].items():
                curves.setdefault(trial, {}).setdefault(event["step"], {})["train/loss"] = loss
        elif event["event"] == "validation":
            for trial, metrics in event["metrics"].items():
                at = curves.setdefault(trial, {}).setdefault(event["step"], {})
                at |= {f"val/{name}": value for name, value in metrics.items()}
        elif event["event"] == "trial":
            row = event["row"]
            settings = {k: v for k, v in row.items() if k not in _final(row) and k != "adapter"}
            Path(folder).mkdir(parents=True, exist_ok=True)
            run = library.init(project=project, name=row["trial"], dir=str(folder), mode=mode, config=settings)
            for step, values in sorted(curves.pop(row["trial"], {}).items()):
                run.log(values, step=step)
            run.summary.update(_final(row))
            run.finish()

    return track


def _final(row: Mapping[str, Any]) -> dict[str, float]:
    """The measured numbers of a row."""
    parts = ("train_loss", "val_", "test_")
    return {k: x for k, x in row.items() if k.startswith(parts) and isinstance(x, float) and math.isfinite(x)}
