"""Stored tensors as params: none missing, none left over, every shape as the config says."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kit.json_text import read_json as json_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = "\n  pytorch_model.bin is not read: save_pretrained(FOLDER) of transformers writes safetensors"
SENTENCEPIECE = {"marian": ("source.spm", "vocab.json"), "t5": ("spiece.model",), "mt5": ("spiece.model",)}
"""Model type -> what its folders may have in place of tokenizer.json."""


Place = Callable[[str, Any], Any]
"""(path, array on the host, or `Quantised`) -> the leaf in its place."""


def on_first_device(path: str, x: Any) -> Any:
    """Where JAX puts what nobody places."""
    return jax.tree.map(jnp.asarray, x)


@dataclass(frozen=True)
class Stored:
    """Tensors of a file or folder, read one at a time.

    Attributes:
      source: the file or folder, for messages.
      config: what says their sizes, for messages.
      names: of all of them.
      read: a name -> the tensor, in torch's layout (kernels are (out, in)), of any float dtype.
    """

    source: Path
    config: str
    names: Collection[str]
    read: Callable[[str], np.ndarray]

    def expect_layers(self, layers: int) -> None:
        """Raises `ValueError` where there are fewer tensors than layers: before names of as many layers are listed."""
        if layers > len(self.names):
            raise ValueError(f"{str(self.source)!r} has {len(self.names)} tensors, {self.config} says {layers} layers.")

    def params(
        self,
        names: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]] | None,
        held: Place = on_first_device,
    ) -> dict[str, Any]:
        """The nested params of `names` (path -> name of a tensor), fp32, kernels (in, out).

        Args:
          names: a name NAME[start:end] stands for those outputs of a tensor; see `TorchName` for matrices (in, out).
          shapes: that the paths must have; None: any.
          held: what is kept of each, made before the next tensor is read.

        Raises:
          ValueError: a tensor is missing, holds no floats, or has not its path's shape; no tensor is named for a path.
        """
        params: dict[str, Any] = {}
        if unnamed := sorted(set(shapes or ()) - set(names)):
            raise ValueError(f"{str(self.source)!r} has no tensor for {unnamed[0]!r}.")
        for path, name in names.items():
            tensor, start, end = sliced(name)
            if tensor not in self.names:
                raise ValueError(f"{str(self.source)!r} has no tensor {tensor!r}, which {path!r} needs.")
            value = np.asarray(self.read(tensor))
            if not jnp.issubdtype(value.dtype, jnp.floating):
                raise ValueError(f"{tensor!r} holds {value.dtype}, not floats; quantised weights are not restored.")
            value = value.T if transposed(path, name) else value
            value = value[..., start:end] if end else value
            if shapes is not None and value.shape != shapes[path]:
                raise ValueError(f"{name!r} gives shape {value.shape} to {path!r}, {self.config} says {shapes[path]}.")
            node = params
            *parents, leaf = path.split("/")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = held(path, np.ascontiguousarray(value, np.float32))
        return params

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same."""
        a, b = (np.asarray(self.read(x)) for x in (name, other))
        return a.shape == b.shape and bool(np.all(a == b))

    def expect_no_others(self, used: Collection[str], ignored: str = "") -> None:
        """Raise `ValueError` where a tensor is not among the `used`: the model computes something else.

        What is stored once more, as `TorchName.also` says, is left where it is the same.

        Args:
          ignored: pattern of further tensors that may be there.
        """
        named = {sliced(name)[0] for name in used}
        left = [name for name in sorted(set(self.names) - named) if not re.fullmatch(ignored, name)]
        twice = {other: str(name) for name in used for other in getattr(name, "also", None) or ()}
        left = [name for name in left if name not in twice or not self.equal(name, twice[name])]
        if left:
            names = ", ".join(map(repr, left[:3]))
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise ValueError(f"{str(self.source)!r} has tensors that this model does not use: {names}{more}.")


def transposed(path: str, name: str) -> bool:
    """Whether torch stores a matrix (out, in) that is (in, out) here."""
    return path.endswith("kernel") and not getattr(name, "inputs_first", False)


def sliced(name: str) -> tuple[str, int, int]:
    """A tensor's name, and which of its outputs NAME[start:end] stands for: (0, 0) for all."""
    match = re.fullmatch(r"(.*)\[(\d+):(\d+)\]", name)
    return (str(name), 0, 0) if match is None else (match[1], int(match[2]), int(match[3]))


def read_config(folder: Path) -> Any:
    """The content of a model folder's config.json, once the folder is seen to hold the three files it must.

    Raises:
      FileNotFoundError: the folder lacks a file.
      ValueError: config.json is not JSON.
    """
    holds = "a model folder holds config.json, model.safetensors and tokenizer.json."
    if (folder / "adapters").is_dir() and not (folder / "config.json").exists():
        raise FileNotFoundError(f"{str(folder)!r} is a study, no model: choose one of its adapters/.")
    for name in ("config.json", SINGLE):
        if not (folder / name).is_file() and not (name == SINGLE and (folder / INDEX).is_file()):
            torch = (
                "\n  pytorch_model.bin is not read: save_pretrained(FOLDER, safe_serialization=True) of transformers"
            )
            pickled = name == SINGLE and any(folder.glob("pytorch_model*.bin"))
            raise FileNotFoundError(f"{str(folder)!r} has no {name}; {holds}" + (torch if pickled else ""))
    data = read_json(folder / "config.json")
    kind = data.get("model_type") if isinstance(data, dict) else None
    others = SENTENCEPIECE.get(kind, ()) if isinstance(kind, str) else ()
    if not any((folder / name).is_file() for name in ("tokenizer.json", *others)):
        instead = f"\n  in place of tokenizer.json a {kind} may have {' and '.join(others)}" if others else ""
        raise FileNotFoundError(f"{str(folder)!r} has no tokenizer.json; {holds}{instead}")
    return data


def open_folder(folder: Path) -> Stored:
    """The tensors of a folder's model.safetensors, or of the files that its model.safetensors.index.json lists.

    Raises:
      FileNotFoundError: the index lists a file that is not there.
      ValueError: a damaged file, an index that is none, or one that finds a tensor where there is none.
    """
    single = folder / SINGLE
    if single.is_file():
        tensors = _open(single)
        return Stored(single, "config.json", set(tensors.keys()), tensors.get_tensor)
    index = folder / INDEX
    data = read_json(index)
    where = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(where, dict) or not all(isinstance(x, str) and Path(x).name == x for x in where.values()):
        raise ValueError(f"{str(index)!r} has no weight_map from tensors to files of its folder.")
    opened = {}
    for file in sorted(set(where.values())):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{str(folder)!r} has no {file}, which {INDEX} lists.")
        opened[file] = _open(folder / file)
    held = {name: file for file, tensors in opened.items() for name in tensors.keys()}  # noqa: SIM118
    for name, file in where.items():
        if held.get(name) != file:
            raise ValueError(f"{str(index)!r} says that {file} holds {name!r}; it does not.")
    return Stored(folder, "config.json", held, lambda name: opened[held[name]].get_tensor(name))


def chat_template(folder: Path) -> str | None:
    """From chat_template.jinja, or tokenizer_config.json, where it is a text or a list of named ones; else None."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    data = read_json(config) if config.is_file() else {}
    template = data.get("chat_template") if isinstance(data, dict) else None
    if isinstance(template, list):
        template = {x["name"]: x["template"] for x in template}.get("default")
    return template


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as e:
        raise ValueError(f"{str(file)!r} is damaged: {e}.\n  copy or install it again") from None


def read_json(file: Path) -> Any:
    """The content of a JSON file; `ValueError` where it is none."""
    try:
        return json_of(file)
    except ValueError as e:
        raise ValueError(f"{str(file)!r} is not JSON: {e}.") from None
