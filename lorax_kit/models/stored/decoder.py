"""LLaMA decoders as `load_model` gives them, and the names of their params."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lorax_kit.models.decoders.llama_config import FAMILIES, LlamaConfig
from lorax_kit.models.stored.load import load_model
from lorax_kit.models.stored.names import decoder_names
from lorax_kit.models.text.tokenizer import Tokenizer


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
    """Our parameter path -> its Hugging Face name (of the ForCausalLM), for every parameter of the decoder.

    Kernels are (in, out) here and (out, in) there; everything else has one layout. The name of the embedding says
    whether it is the head, too.
    """
    kind = "qwen3" if config.query_key_norm else "llama" if config.output_bias or not config.attention_bias else "qwen2"
    return decoder_names(
        {
            "model_type": kind,
            "num_hidden_layers": config.num_hidden_layers,
            "tie_word_embeddings": config.tie_word_embeddings,
            "attention_bias": config.output_bias,
            "mlp_bias": config.mlp_bias,
        }
    )


def load_llama(source: str | Path = "smollm2") -> PretrainedLlama:
    """`load_model` of a decoder of LLaMA's kind.

    Raises:
      ValueError: another family, or as `load_model`.
    """
    loaded = load_model(source)
    if loaded.family not in FAMILIES:
        raise ValueError(f"{str(source)!r} is of the family {loaded.family!r}, and no decoder of LLaMA's kind.")
    return PretrainedLlama(loaded.config, loaded.params, loaded.tokenizer, loaded.chat_template, str(source))
