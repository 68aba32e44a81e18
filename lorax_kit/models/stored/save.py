"""A pretrained model as a folder that transformers reads, and `load_model`."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_kit.core.merge import beyond
from lorax_kit.core.paths import Packed, Params, flatten, is_array
from lorax_kit.models.stored.families import FAMILIES
from lorax_kit.models.stored.load import Loaded
from lorax_kit.models.stored.weights import SINGLE, read_json, sliced, transposed

COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "source.spm", "target.spm", "spiece.model", "sentencepiece.bpe.model"),
    *("tokenizer.model", "chat_template.jinja", "generation_config.json"),
)
"""What comes along from the folder that a model was loaded from, where it is there."""


def save_model(folder: str | Path, loaded: Loaded, params: Params | None = None, *, dtype: str = "float32") -> None:
    """Write a model as a Hugging Face folder: config.json, model.safetensors and the tokenizer's files.

    The folder is there whole or not at all. It holds the backbone and its trained head, and not what `load_model` left
    (poolers, heads of masked language models).

    Args:
      folder: where; it must not exist.
      loaded: the model; of several heads, or of none, keep what you want with `dataclasses.replace(loaded, heads=...)`.
      params: of the backbone, in place of its own: such as `lk.merge` gives.
      dtype: of the tensors: "float32", "bfloat16" or "float16".

    Raises:
      ValueError: the folder exists; params of other paths or shapes, or that are no arrays; a head that no class of
        transformers has; values that the dtype does not hold.

    Example:
      >>> import tempfile
      >>> from lorax_kit.models import load_model
      >>> with tempfile.TemporaryDirectory() as place:
      ...     save_model(Path(place) / "copy", load_model("minilm"))
      ...     load_model(Path(place) / "copy").family
      'bert'
    """
    target = Path(folder).absolute()
    if target.exists() or target.is_symlink():
        raise ValueError(f"{str(target)!r} exists.\n  choose another path")
    data = _config(loaded, dtype)
    tensors = _tensors(loaded, loaded.params if params is None else params, data)
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}.", dir=target.parent))
    try:
        new = stage / "written"
        new.mkdir()
        _write_tensors(new / SINGLE, {name: cast_tensor(name, x, dtype) for name, x in tensors.items()})
        (new / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        _write_tokenizer(new, loaded)
        new.rename(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _head_of(loaded: Loaded) -> str:
    """The name of the one head, or "backbone": what the class of transformers depends on."""
    if not loaded.heads:
        return "backbone"
    head, *more = sorted(loaded.heads)
    if more:
        raise ValueError(
            f"the model has the heads {', '.join(sorted(loaded.heads))}; a folder holds one.\n"
            "  give dataclasses.replace(loaded, heads={...}) with that one"
        )
    own, theirs = set(flatten(loaded.heads[head])[0]), set(FAMILIES[loaded.family].heads.get(head, ()))
    if own != theirs:
        raise ValueError(
            f"the head {head!r} has {', '.join(sorted(own))}; that of a {loaded.family} in transformers has "
            f"{', '.join(sorted(theirs)) or 'none of its kind'}.\n"
            "  dataclasses.replace(loaded, heads={}) saves the backbone alone"
        )
    return head


def _tensors(loaded: Loaded, params: Params, data: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor of the folder by its name, in torch's layout, fp32."""
    family, head = FAMILIES[loaded.family], _head_of(loaded)
    given = _like(params, loaded.params)
    tied = {"tie_word_embeddings": getattr(loaded.config, "tie_word_embeddings", True)}  # as the tensors had it
    names = family.names_under(family.classes[head].prefix, {**data, **tied})
    pairs = [(path, name, given[path]) for path, name in names.items() if path in given]
    if head != "backbone":
        trained = flatten(loaded.heads[head])[0]
        pairs += [(path, name, trained[path]) for path, name in family.heads[head].items()]
    parts: dict[str, dict[int, np.ndarray]] = {}
    for path, name, value in pairs:
        tensor, start, _ = sliced(name)
        x = np.asarray(value, np.float32)
        parts.setdefault(tensor, {})[start] = x.T if transposed(path, name) else x
    return {name: np.concatenate([own[i] for i in sorted(own)], axis=-1) for name, own in parts.items()}


def _like(params: Params, expected: Params) -> dict[str, Any]:
    """The params by path, once they are seen to be arrays of the paths and shapes expected."""
    given, wanted = flatten(params)[0], flatten(expected)[0]
    for path in sorted({*given, *wanted}):
        if path not in given or path not in wanted:
            raise ValueError(f"the params have {'no' if path not in given else 'a'} {path!r}, unlike the model's own.")
        x = given[path]
        if isinstance(x, Packed) or not is_array(x):
            raise ValueError(f"{path!r} is a {type(x).__name__}, not an array: restore it before it is saved.")
        if x.shape != wanted[path].shape:
            raise ValueError(f"{path!r} has shape {x.shape}, the model's own has {wanted[path].shape}.")
    return given


def _config(loaded: Loaded, dtype: str) -> dict[str, Any]:
    """The content of config.json: that of the model's folder, or of a LLaMA from a GGUF file, and what is saved."""
    if loaded.folder is None:
        sizes = {key: value for key, value in asdict(loaded.config).items() if value is not None}
        eos = loaded.special.eos
        ids = {"bos_token_id": loaded.special.bos, "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None}
        data = {"model_type": loaded.family, "hidden_act": "silu", **sizes, **ids, "pad_token_id": loaded.special.pad}
    else:
        data = read_json(loaded.folder / "config.json")
    head = _head_of(loaded)
    data = {key: value for key, value in data.items() if key != "torch_dtype"} | {
        "architectures": [FAMILIES[loaded.family].classes[head].name],
        "dtype": dtype,
    }
    if head != "classify":
        return data
    count = loaded.heads[head]["output"]["kernel"].shape[1]
    if loaded.labels is None or len(loaded.labels) != count:
        raise ValueError(f"the head 'classify' has {count} outputs, the labels are {loaded.labels!r}: one for each.")
    named = dict(enumerate(loaded.labels))
    return data | {"id2label": {str(i): x for i, x in named.items()}, "label2id": {x: i for i, x in named.items()}}


def cast_tensor(name: str, x: np.ndarray, dtype: str) -> np.ndarray:
    """Floats in another dtype; what counts or indexes stays.

    Raises:
      AdapterError: the dtype does not hold them.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    with np.errstate(over="ignore"):
        made = x.astype(jnp.dtype(dtype))
    if x.size and not np.isfinite(made).all():
        largest = np.max(np.abs(x[np.isfinite(x)].astype(np.float64)), initial=0)
        if largest > float(jnp.finfo(dtype).max):
            raise beyond(name, largest, dtype)
    return made


def _write_tokenizer(folder: Path, loaded: Loaded) -> None:
    """The files that the model's folder has, or those of a GGUF file's tokenizer."""
    if loaded.folder is not None:
        for name in COPIED:
            if (loaded.folder / name).is_file():
                shutil.copyfile(loaded.folder / name, folder / name)
        return
    loaded.tokenizer.inner.save(str(folder / "tokenizer.json"))
    ids = {"bos_token": loaded.special.bos, "eos_token": next(iter(loaded.special.eos), None)}
    ids["pad_token"] = loaded.special.pad
    words = {key: loaded.tokenizer.inner.id_to_token(i) for key, i in ids.items() if i is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **words}
    if loaded.chat_template is not None:
        settings["chat_template"] = loaded.chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    # Copies of what is not contiguous: a transposed view would be written in the order it lies in memory.
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes private files; a model is there to be shared
