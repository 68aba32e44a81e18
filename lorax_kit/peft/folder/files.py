"""The two files of a PEFT folder, read with care, for a folder may come from anywhere; and its tensors, sorted."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lorax_kit.checkpoint.tensors import read_metadata, read_tensors
from lorax_kit.core.method import Method
from lorax_kit.errors import AdapterError
from lorax_kit.peft_form import PeftForm

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT, PREFIX = "base_model.", "base_model.model."
READ = {"F32": 4, "BF16": 2, "F16": 2}
LARGEST = 10**15
"""No number in a config is above it: not a rank, not a seed, not a count of steps."""


def read_json(file: Path) -> dict[str, Any]:
    """An object of JSON.

    Raises:
      AdapterError: bytes that are no UTF-8, no JSON, no object, nested too deeply, a key that comes twice, a number
        that is no finite one of ordinary size.
    """
    try:
        data = json.loads(
            file.read_bytes().decode("utf-8"),
            object_pairs_hook=_once,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=_real,
        )
    except RecursionError:
        raise AdapterError(f"{str(file)!r} is nested too deeply.") from None
    except ValueError as e:  # also bytes that are not UTF-8
        raise AdapterError(f"{str(file)!r} is not JSON: {e}.") from None
    if not isinstance(data, dict):
        raise AdapterError(f"{str(file)!r} must hold an object, not {type(data).__name__}.")
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {key!r} comes twice")
        out[key] = value
    return out


def _integer(text: str) -> int:
    if len(text) > 16 or abs(int(text)) > LARGEST:
        raise ValueError(f"the number {text[:12]}... is too large")
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if not abs(value) <= LARGEST:
        raise ValueError(f"the number {text[:12]} is not finite, or too large")
    return value


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of the folder by its whole name.

    Raises:
      AdapterError: no such file, a damaged one, a name that comes twice, a dtype that is not float32, bfloat16 or
        float16, a value that is not finite.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        raise AdapterError(
            f"{str(folder)!r} has no {WEIGHTS}.\n"
            "  pickled weights are not read: write it by save_pretrained(..., safe_serialization=True)"
        )
    _check_header(file)
    tensors = read_tensors(file)
    for name, x in tensors.items():
        if not np.isfinite(x.astype(np.float32)).all():
            raise AdapterError(f"the tensor {name!r} holds values that are not finite: the training had failed.")
    return tensors


def _check_header(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        text = opened.read(length) if 8 + length <= size else b""
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
        entries = {n: (x["dtype"], x["shape"], x["data_offsets"]) for n, x in header.items() if n != "__metadata__"}
        end = max((offsets[1] for *_, offsets in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as e:
        what = e if isinstance(e, ValueError) and text else "its header does not fit into it"
        raise AdapterError(f"{str(file)!r} is damaged: {what}.\n  restore it from a copy") from None
    if not isinstance(end, int) or 8 + length + end != size:
        raise AdapterError(
            f"{str(file)!r} is damaged: its header tells of {end} bytes of tensors, it has {size - 8 - length}.\n"
            "  restore it from a copy"
        )
    for name, (dtype, shape, offsets) in entries.items():
        numbers = [x for given in (shape, offsets) for x in (given if isinstance(given, list) else [None])]
        if not isinstance(dtype, str) or len(offsets) != 2 or not all(type(x) is int and x >= 0 for x in numbers):
            raise AdapterError(
                f"{str(file)!r} is damaged: the tensor {name!r} has dtype {str(dtype)[:40]} and shape "
                f"{str(shape)[:40]}, at {str(offsets)[:40]}.\n  restore it from a copy"
            )
        if dtype not in READ:
            raise AdapterError(
                f"the tensor {name!r} is {_word(dtype)}; float32, bfloat16 and float16 can be read.\n"
                "  save the adapter in one of them: model.to(torch.float32).save_pretrained(...)"
            )
        if prod(shape) * READ[dtype] != offsets[1] - offsets[0]:
            raise AdapterError(f"{str(file)!r} is damaged: the tensor {name!r} has not the bytes of its shape {shape}.")


def _word(dtype: Any) -> str:
    """A dtype as numpy calls it: F64 is float64."""
    text = str(dtype)
    kinds = {"F": "float", "I": "int", "U": "uint"}
    return f"{kinds[text[0]]}{text[1:].lower()}" if text[:1] in kinds else text.lower()


def config_digest(folder: Path) -> dict[str, str]:
    """Of a folder's config, to stand beside its tensors; PEFT reads over it."""
    return {"lorax_config": f"sha256 {hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()}"}


def config_notes(folder: Path) -> list[str]:
    """A line where the config is another than was written with the tensors: edited perhaps, which PEFT allows."""
    written, here = read_metadata(folder / WEIGHTS).get("lorax_config"), config_digest(folder)["lorax_config"]
    changed = written is not None and written != here
    return [f"{CONFIG} is not as it was written with these tensors: it was edited, or is damaged"] * changed


def write_json(file: Path, config: Mapping[str, Any]) -> None:
    """Write a config as PEFT does: keys in order."""
    file.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")


@dataclass
class Sorted:
    """Tensors by what they are.

    Attributes:
      modules: module -> end of the name -> tensor, of the main method.
      beside: key of the config -> module -> end of the name -> tensor (trainable tokens).
      shared: of the whole adapter, by name.
      rest: by their names in the torch model: what was trained in full, and copies of the base.
    """

    modules: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    beside: dict[str, dict[str, dict[str, np.ndarray]]] = field(default_factory=dict)
    shared: dict[str, np.ndarray] = field(default_factory=dict)
    rest: dict[str, np.ndarray] = field(default_factory=dict)


def sort_out(tensors: Mapping[str, np.ndarray], form: PeftForm, besides: Mapping[str, Method]) -> Sorted:
    """Sort tensors by the ends of their names.

    Args:
      besides: key of the config -> the method of the modules that it names.

    Raises:
      AdapterError: a name without PEFT's prefix, or a tensor that comes under two names.
    """
    out = Sorted()
    ends = {**{e: e for e in form.endings}, **form.older}
    beside = {}
    for key, method in besides.items():
        assert method.peft is not None
        beside[key] = (method.peft.beside[form.peft_type][0], method.peft.endings[0])
    for full, x in tensors.items():
        if full.startswith(ROOT) and "." not in full.removeprefix(ROOT):
            out.shared[full.removeprefix(ROOT)] = x
            continue
        if not full.startswith(PREFIX):
            raise AdapterError(f"the tensor {full!r} is not PEFT's: its names start with {PREFIX!r}.")
        name = full.removeprefix(PREFIX)
        held, end = out.modules, _end_of(name, ends)
        for key, (long, short) in beside.items():
            if name.endswith(f".{long}"):
                held, end, ends_here = out.beside.setdefault(key, {}), long, {long: short}
                break
        else:
            ends_here = ends
        if end is None:
            _refuse_named_adapter(full, ends)
            out.rest[name] = x
            continue
        module_tensors = held.setdefault(name.removesuffix(f".{end}"), {})
        if ends_here[end] in module_tensors:
            raise AdapterError(f"the tensor {full!r} comes twice, under an older name too.")
        module_tensors[ends_here[end]] = x
    return out


def _end_of(name: str, ends: Iterable[str]) -> str | None:
    return max((e for e in ends if name.endswith(f".{e}")), key=len, default=None)


def _refuse_named_adapter(full: str, ends: Iterable[str]) -> None:
    """Raise `AdapterError` for a tensor of a model in memory, whose name holds the adapter's behind the factor's."""
    factors = "|".join(sorted({re.escape(e.removesuffix(".weight")) for e in ends}, key=len, reverse=True))
    own = re.search(rf"\.({factors})\.(?!weight$)(.+?)(\.weight)?$", full)
    if own:
        raise AdapterError(
            f"the tensor {full!r} names its adapter, {own[2]!r}, which the files of save_pretrained leave out.\n"
            f"  rename it: {full.replace(f'.{own[1]}.{own[2]}', f'.{own[1]}')!r}, or write it by save_pretrained"
        )
