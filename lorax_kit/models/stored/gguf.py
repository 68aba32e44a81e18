"""LLaMA decoders from GGUF files, whose keys, names and order of rows are llama.cpp's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax_kit.extras import need
from lorax_kit.models.decoders.llama_config import LlamaConfig
from lorax_kit.models.stored.weights import Stored
from lorax_kit.models.text.tokenizer import Tokenizer

SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "vocab_size": "vocab_size",
}
"""Our name of a size -> its key, after "llama."."""

TENSORS = {
    "attention/norm/scale": "attn_norm",
    "attention/query/kernel": "attn_q",
    "attention/key/kernel": "attn_k",
    "attention/value/kernel": "attn_v",
    "attention/output/kernel": "attn_output",
    "mlp/norm/scale": "ffn_norm",
    "mlp/gate/kernel": "ffn_gate",
    "mlp/up/kernel": "ffn_up",
    "mlp/down/kernel": "ffn_down",
}

SPLIT_DIGITS = {"smollm": True, "gpt-2": False}
"""tokenizer.ggml.pre, how a text is split before the merges -> whether digits stand alone."""

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type


class Gguf(NamedTuple):
    """A decoder in a GGUF file: sizes, tensors, tokenizer, chat template (a Jinja text), ids of special tokens."""

    config: LlamaConfig
    stored: Stored
    tokenizer: Tokenizer
    chat_template: str | None
    bos: int | None
    eos: int | None
    pad: int | None


def gguf_names(config: LlamaConfig) -> dict[str, str]:
    """Our parameter path -> its name in a GGUF file, for every parameter of the decoder."""
    names = {"embeddings/embedding": "token_embd.weight", "norm/scale": "output_norm.weight"}
    for i in range(config.num_hidden_layers):
        names |= {f"layer_{i}/{ours}": f"blk.{i}.{theirs}.weight" for ours, theirs in TENSORS.items()}
    return names if config.tie_word_embeddings else names | {"head/kernel": "output.weight"}


def read_gguf(file: Path) -> Gguf:
    """What a GGUF file holds.

    The tensors are read in torch's layout and Hugging Face's order of rows: llama.cpp turns entries 2 i and 2 i + 1 of
    a head as a pair, where `LlamaModel` turns i and i + K/2, and stores the rows of query and key accordingly.

    Raises:
      ImportError: the package gguf is not installed.
      ValueError: a damaged file, another architecture, a setting that this decoder does not compute.
    """
    need("llama", "gguf")
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as e:
        raise ValueError(f"{str(file)!r} is damaged, or not a GGUF file: {e}.") from None
    if reader.byte_order != "I":
        raise ValueError(f"{str(file)!r} has the byte order of another machine.")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, tied="output.weight" not in tensors)
    heads_of = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ValueError(f"{name!r} is of type {tensor.tensor_type.name}, which gguf does not restore.") from None
        heads = next((n for part, n in heads_of.items() if name.endswith(f".{part}.weight")), 0)
        if heads and value.shape[0] == heads * config.head_size:  # another size is an error where shapes are checked
            value = value.reshape(heads, config.head_size // 2, 2, -1).swapaxes(1, 2).reshape(value.shape)
        return value

    stored = Stored(file, "its metadata", tensors, read)
    bos, eos, pad = (metadata.get(f"tokenizer.ggml.{x}_token_id") for x in ("bos", "eos", "padding"))
    return Gguf(config, stored, _tokenizer(metadata), metadata.get("tokenizer.chat_template"), bos, eos, pad)


def _config(metadata: Mapping[str, Any], tied: bool) -> LlamaConfig:
    if metadata.get("general.architecture") != "llama":
        raise ValueError(f"the file holds a {metadata.get('general.architecture')!r}; this decoder is only 'llama'.")
    given = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    absent = {
        "attention.head_count_kv": given.get("attention.head_count"),
        "rope.freq_base": 1e4,
        "vocab_size": len(metadata.get("tokenizer.ggml.tokens", ())),
    }
    sizes: dict[str, Any] = {name: (absent | given).get(key) for name, key in SIZES.items()}
    missing = [f"llama.{SIZES[name]}" for name, value in sizes.items() if value is None]
    if missing:
        raise ValueError(f"the file lacks {', '.join(missing)}.")
    # Stored in fp32: 1e-5 would otherwise be 9.99999975e-06.
    sizes = {name: float(str(np.float32(x))) if isinstance(x, float) else x for name, x in sizes.items()}
    config = LlamaConfig(**sizes, tie_word_embeddings=tied)
    size = config.head_size
    only = {
        "rope.dimension_count": size,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.scaling.type": "none",
        "expert_count": 0,
        "expert_used_count": 0,
    }
    for key in sorted(set(given) - set(SIZES.values())):
        if key not in only:
            raise ValueError(f"the file sets llama.{key} to {given[key]!r}, which this decoder does not know.")
        if given[key] != only[key]:
            raise ValueError(f"the file has llama.{key} {given[key]!r}; this decoder computes only {only[key]!r}.")
    return config


def _tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    given = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    missing = [key for key in ("model", "pre", "tokens", "token_type", "merges") if key not in given]
    if missing:
        raise ValueError(f"the file lacks tokenizer.ggml.{missing[0]}; only byte-level BPE tokenizers are read.")
    for key, known in (("model", ["gpt2"]), ("pre", list(SPLIT_DIGITS))):
        if given[key] not in known:
            raise ValueError(f"the file's tokenizer.ggml.{key} is {given[key]!r}, known are {', '.join(known)}.")
    tokens, kinds = given["tokens"], given["token_type"]
    if len(kinds) != len(tokens):
        raise ValueError(f"the file has {len(tokens)} tokens and {len(kinds)} types of tokens.")
    merges = [tuple(merge.split(" ")) for merge in given["merges"]]
    if not all(len(merge) == 2 for merge in merges):
        raise ValueError("the file has a merge that is not of two tokens.")

    def around(which: str) -> str | None:
        if not given.get(f"add_{which}_token", False):
            return None
        at = given.get(f"{which}_token_id")
        if at is None or at >= len(tokens):
            raise ValueError(f"the file adds a {which} token to every text, and has none: its id is {at}.")
        return tokens[at]

    return Tokenizer.from_merges(
        tokens,
        merges,
        special=[x for x, kind in zip(tokens, kinds, strict=True) if kind in (UNKNOWN, CONTROL)],
        whole=[x for x, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED],
        split_digits=SPLIT_DIGITS[given["pre"]],
        start=around("bos"),
        end=around("eos"),
    )
