"""The programs of a model that writes, in files, and a loop around them in numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax_kit.core.paths import Params
from lorax_kit.generate.programs import Part
from lorax_kit.models import Loaded
from lorax_kit.serve.litert import load_litert, save_litert
from lorax_kit.serve.onnx import load_onnx, save_onnx, share_weights
from lorax_kit.serve.stablehlo import load_stablehlo, save_stablehlo

WEIGHTS = "weights.bin"
"""What the programs of one model have in common."""


def one_at_a_time(parts: Sequence[Part], slots: int) -> list[Part]:
    """The same programs for sizes that are fixed: one row, one token, and texts of so many tokens."""
    sizes = {"batch": 1, "tokens": 1, "slots": slots, "length": slots}

    def fixed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(n if isinstance(n, int) else sizes[str(n)] for n in x.shape), x.dtype)

    return [replace(part, inputs={name: fixed(x) for name, x in part.inputs.items()}) for part in parts]


def save_parts(
    folder: Path, parts: Sequence[Part], params: Params, form: str, *, int8: bool = False, platforms: Sequence[str] = ()
) -> dict[str, str]:
    """Write each program to NAME.FORM in an existing folder; of several ONNX programs the weights once, beside them.

    Args:
      form: "onnx", "stablehlo", or, of parts of fixed sizes, "litert", whose files end in .tflite.
      int8: of ONNX, weights in 8 bits in blocks.
      platforms: that StableHLO is lowered for.

    Returns:
      name of a part -> its file's name.
    """
    files = {part.name: f"{part.name}.{'tflite' if form == 'litert' else form}" for part in parts}
    for part in parts:
        file = folder / files[part.name]
        if form == "onnx":
            save_onnx(file, part.fn, params, part.inputs, outputs=part.outputs, int8=int8, blocks=True)
        elif form == "litert":
            save_litert(file, part.fn, params, part.inputs, outputs=part.outputs)
        else:
            save_stablehlo(file, part.fn, params, part.inputs, platforms=platforms)
    if form == "onnx" and len(parts) > 1:
        share_weights([folder / name for name in files.values()], folder / WEIGHTS)
    return files


class Runner(NamedTuple):
    """Exported programs as a model that writes.

    Attributes:
      parts: what each takes and gives, in the order in which they run.
      runs: name -> `run(*arrays)`.
      factors: of an adapter, input -> array; {} where it is merged.
      start: the first token of what an encoder-decoder writes.
      longest: tokens of the longest text; None: there is no limit.
    """

    parts: Sequence[Part]
    runs: Mapping[str, Callable[..., Sequence[Any]]]
    factors: Mapping[str, np.ndarray]
    start: int | None
    longest: int | None = None

    def begin(self, ids: np.ndarray, mask: np.ndarray, new: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Logits (B, V) after prompts (B, T), padding on the left, and what `step` takes; `new` tokens may follow."""
        if self.fixed:
            per_row = [self._read_alone(row[on > 0]) for row, on in zip(ids, mask, strict=True)]
            return np.concatenate([logits for logits, _ in per_row]), {"rows": [held for _, held in per_row]}
        rows, slots, length = len(ids), new + (ids.shape[1] if len(self.parts) == 1 else 1), ids.shape[1]
        slots = min(-(-slots // 32) * 32, self.longest or 2**31)
        held = self._empty({"batch": rows, "past": 0, "slots": slots, "length": length})
        if len(self.parts) > 1:
            held |= self._run(self.parts[0], {**held, "ids": ids, "mask": mask}) | {"read": mask != 0}
            ids = np.full((rows, 1), self.start, np.int32)
            mask = np.ones_like(ids)
        return self._step(ids, mask, held)

    def step(self, ids: np.ndarray, mask: np.ndarray, held: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Logits (B, V) after one more token a row, (B, 1)."""
        if not self.fixed:
            return self._step(ids, mask, held)
        per_row = [self._step(ids[i : i + 1], mask[i : i + 1], own) for i, own in enumerate(held["rows"])]
        return np.concatenate([logits for logits, _ in per_row]), {"rows": [own for _, own in per_row]}

    @property
    def fixed(self) -> bool:
        """Whether the programs take a row alone, token by token."""
        return all(isinstance(n, int) for n in self.parts[-1].inputs["ids"].shape)

    def _read_alone(self, ids: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """One row, token by token; what an encoder reads is padded to its size."""
        held, logits = self._empty({}), np.zeros((1, 0))
        if len(self.parts) > 1:
            whole = np.zeros(self.parts[0].inputs["ids"].shape, np.int32)
            mask = np.zeros_like(whole)
            whole[0, whole.shape[1] - len(ids) :], mask[0, whole.shape[1] - len(ids) :] = ids, 1
            held |= self._run(self.parts[0], {**held, "ids": whole, "mask": mask}) | {"read": mask != 0}
            ids = np.asarray([self.start])
        for token in ids:
            logits, held = self._step(np.asarray([[token]], np.int32), np.ones((1, 1), np.int32), held)
        return logits, held

    def _empty(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """A cache that has read nothing, and the adapter."""
        inputs, held = self.parts[-1].inputs, dict[str, Any](self.factors)
        for name in self.parts[-1].carried.values():
            shape = [n if isinstance(n, int) else sizes[str(n)] for n in inputs[name].shape]
            held[name] = np.zeros(shape, inputs[name].dtype)
        return held

    def _step(self, ids: np.ndarray, mask: np.ndarray, held: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        decoder = self.parts[-1]
        outputs = self._run(decoder, {**held, "ids": ids, "mask": mask})
        after = {name: outputs[output] for output, name in decoder.carried.items()}
        return np.asarray(outputs["logits"]), {**held, **after}

    def greedy(self, ids: np.ndarray, mask: np.ndarray, new: int) -> np.ndarray:
        """The likeliest tokens after prompts, (B, new)."""
        logits, held = self.begin(ids, mask, new)
        tokens = [logits.argmax(-1).astype(np.int32)]
        while len(tokens) < new:
            logits, held = self.step(tokens[-1][:, None], np.ones((len(ids), 1), np.int32), held)
            tokens.append(logits.argmax(-1).astype(np.int32))
        return np.stack(tokens, axis=1)

    def _run(self, part: Part, given: Mapping[str, Any]) -> dict[str, Any]:
        outputs = self.runs[part.name](*(given[name] for name in part.inputs))
        return dict(zip(part.outputs, outputs, strict=True))


def load_parts(
    folder: Path,
    parts: Sequence[Part],
    files: Mapping[str, str],
    loaded: Loaded,
    factors: Mapping[str, np.ndarray] | None = None,
) -> Runner:
    """What `save_parts` wrote of a model, on this machine."""
    runs = {part.name: _load(folder / files[part.name], part) for part in parts}
    return Runner(parts, runs, factors or {}, loaded.special.start, loaded.positions)


def _load(file: Path, part: Part) -> Callable[..., Sequence[Any]]:
    if file.suffix == ".tflite":
        return load_litert(file, part.outputs)
    return load_onnx(file) if file.suffix == ".onnx" else load_stablehlo(file)


def adapter_arrays(parts: Sequence[Part], factors: Mapping[str, tuple[Any, Any]]) -> dict[str, np.ndarray]:
    """The inputs of an adapter for programs of `with_factors`: ranks filled up to the largest, missing sites zero.

    Args:
      factors: path -> a (R, *stack, *in) and b (R, *stack, *out), the scale within b.

    Raises:
      KeyError: a site that the programs have no inputs for.
    """
    inputs = {name: x for part in parts for name, x in part.inputs.items() if "/" in name}
    rank = max((len(a) for a, _ in factors.values()), default=1)
    out = {name: np.zeros((rank, *x.shape[1:]), np.float32) for name, x in inputs.items()}
    for path, pair in factors.items():
        for name, x in zip("ab", pair, strict=True):
            out[f"{path}/{name}"][: len(x)] = np.asarray(x, np.float32)
    return out


def described(parts: Sequence[Part], files: Mapping[str, str]) -> dict[str, Any]:
    """Plain data of the programs: file, inputs with their sizes, outputs, and what is carried on."""
    return {
        part.name: {
            "file": files[part.name],
            "inputs": {
                name: {"shape": [n if isinstance(n, int) else str(n) for n in x.shape], "dtype": str(x.dtype)}
                for name, x in part.inputs.items()
            },
            "outputs": list(part.outputs),
            "carried": part.carried,
        }
        for part in parts
    }
