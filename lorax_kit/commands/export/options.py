"""How a model is exported, and what makes it smaller first: what both kinds of export share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax_kit.commands.compress.compression import load_small
from lorax_kit.commands.compress.methods import Small, finished, smaller, statistics_for
from lorax_kit.commands.compress.recipe import Healing, Recipe
from lorax_kit.commands.compress.subjects import Subject
from lorax_kit.core.paths import Params, flatten
from lorax_kit.core.quantised import Quantised
from lorax_kit.core.specs.setting import is_int
from lorax_kit.errors import ExportError


@dataclass(frozen=True, kw_only=True)
class Export:
    """How a model is written, and measured against JAX.

    Args:
      form: "stablehlo" or "onnx"; "safetensors" of a model that is called once a batch; "litert" of one that writes,
        whose program reads one token of one text.
      int8: quantise the ONNX model: the matrices of one that writes, a scale for each 64 inputs; of another its
        activations, too, and a compressed one in blocks, which is closer.
      platforms: that StableHLO is lowered for.
      rounds: alternating rounds of latency, JAX against the exported model; 0 leaves latency out.
      overwrite: replace an earlier export; otherwise it is an error.

    Raises:
      ExportError: int8 of another format than ONNX, no platforms, a number of rounds that is none.
    """

    form: str
    int8: bool = False
    platforms: Sequence[str] = ("cpu",)
    rounds: int = 15
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.int8 and self.form != "onnx":
            raise ExportError(f"int8 is a form of onnx, not of {self.form}.\n  compress first by method int8")
        if not self.platforms or isinstance(self.platforms, str):
            raise ExportError(f"platforms is {self.platforms!r}; it must be names: ('cpu', 'cuda').")
        if not is_int(self.rounds) or self.rounds < 0:
            raise ExportError(f"rounds is {self.rounds!r}; it must be an integer of at least 0.")


def shrunk(subject: Subject, by: Recipe | str | Path | None, *, progress: bool = True) -> tuple[Small, dict[str, Any]]:
    """The model that is exported, and how it was made: method, keep and whether it was healed.

    Args:
      by: a recipe; a folder of `lorax-kit compress --out`, healed or not; None: the model as it is.

    Raises:
      CompressError: what compression raises; a folder whose model was made of another one.
    """
    if by is None:
        return Small(subject.apply, subject.params), {"method": None, "keep": None, "healed": False}
    if isinstance(by, Recipe):
        Healing().check(by)
        stats = statistics_for(subject, [by.way], by.batches, allocation=by.allocation, progress=progress)
        model = finished(subject, by.way, smaller(subject, by, stats, progress=progress))
        return model, {"method": by.method, "keep": by.keep, "healed": False}
    row, model = load_small(by, subject)
    return model, {"method": row["method"], "keep": row["keep"], "healed": row["metric_healed"] is not None}


def refuse_quantised(params: Params) -> None:
    """Raise for params that int8 is asked of and that have few bits already."""
    if any(isinstance(x, Quantised) for x in flatten(params)[0].values()):
        raise ExportError("int8 quantises float params, and these are quantised already.\n  leave int8 out")
