"""Sizes of a LLaMA decoder and of its relatives, read from Hugging Face's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from lorax_kit.models.stored.sizes import check_sizes

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How Llama 3.1 stretches rotary positions (Dubey et al., arXiv 2407.21783), named as in config.json.

    Pairs that turn less than `low_freq_factor` times over the original positions turn `factor` times slower, those
    above `high_freq_factor` as before, and those between by a share of both.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor is {self.low_freq_factor!r}; it must be below high_freq_factor, "
                f"{self.high_freq_factor!r}."
            )


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of a LLaMA decoder, named as in Hugging Face's config.json; the defaults are SmolLM2-135M's.

    Args:
      head_dim: entries of a head; None: hidden_size / num_attention_heads.
      attention_bias, output_bias, mlp_bias: whether query, key and value, the output of attention, and the products of
        the feed-forward block have biases.
      query_key_norm: a norm over the entries of each head of query and key (Qwen3).
      gelu: GeGLU with the tanh form in place of SwiGLU, and embeddings times sqrt(hidden_size), and norms of 1 + scale
        (Gemma).
      sliding_window: how many places a token sees, its own among them; None: all before it.
      rope_scaling: of Llama 3; None: plain positions.

    Raises:
      ValueError: a size is not a number of its kind, or sizes do not fit each other.
    """

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    max_position_embeddings: int = 8192
    rope_theta: float = 1e5
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    head_dim: int | None = None
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    gelu: bool = False
    sliding_window: int | None = None
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        check_sizes(self)
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if (self.head_dim is None and self.hidden_size % heads) or self.head_size % 2:
            raise ValueError(f"{heads} heads do not divide hidden_size {self.hidden_size} into heads of an even size.")
        if heads % shared:
            raise ValueError(f"{shared} key and value heads do not divide {heads} heads into groups.")

    @property
    def head_size(self) -> int:
        """Entries of a head, K."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.max_position_embeddings

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LlamaConfig:
        """From a config.json's content.

        What older files lack: one key and value head per head, rope_theta 10,000, a head that is not the embedding.

        Raises:
          ValueError: the file lacks a size, or describes a decoder that this one would not compute.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"config.json must be an object, not {type(data).__name__}.")
        given = {key: value for key, value in data.items() if value is not None}
        kind = given.get("model_type", "llama")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise ValueError(
                f"config.json has model_type {kind!r}; this decoder computes only {', '.join(map(repr, FAMILIES))}."
            )
        gemma = kind == "gemma"
        act = given.get("hidden_activation", given.get("hidden_act", "gelu_pytorch_tanh" if gemma else "silu"))
        if act not in (("gelu_pytorch_tanh", "gelu") if gemma else ("silu",)):
            raise ValueError(
                f"config.json has hidden_act {act!r}; this decoder computes only 'silu', and Gemma's GELU."
            )
        if given.get("use_bidirectional_attention"):
            raise ValueError("config.json has use_bidirectional_attention true; this decoder looks back alone.")
        absent = {"num_key_value_heads": given.get("num_attention_heads"), "tie_word_embeddings": gemma}
        sizes: dict[str, Any] = absent | given
        biased = kind == "qwen2" or given.get("attention_bias", False)
        sizes |= {
            "rope_theta": _rope(given)["rope_theta"],
            "rope_scaling": _scaling(_rope(given)),
            "attention_bias": biased,
            "output_bias": biased and kind != "qwen2",
            "mlp_bias": given.get("mlp_bias", False),
            "query_key_norm": kind == "qwen3",
            "gelu": gemma,
            "sliding_window": _window(data, kind),
        }
        optional = {"head_dim", "sliding_window", "rope_scaling"}
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if sizes.get(name) is None and name not in optional]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}.")
        taken: dict[str, Any] = {name: sizes.get(name) for name in names}
        config = cls(**taken)
        same = config.head_dim is not None and config.head_dim * config.num_attention_heads == config.hidden_size
        return replace(config, head_dim=None) if same else config


def _window(data: Mapping[str, Any], kind: str) -> int | None:
    """Places that a token sees. Qwen has a window only where a flag says so, of its upper layers alone."""
    if kind in ("qwen2", "qwen3") and data.get("use_sliding_window"):
        raise ValueError("config.json has use_sliding_window true; this decoder computes no window of some layers.")
    # Mistral's files say null where there is none: transformers takes an absent one for 4096.
    window: int | None = data.get("sliding_window", 4096) if kind == "mistral" else None
    return window


def _rope(data: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of rotary angles: at the top and in rope_scaling (4), or within rope_parameters (5)."""
    rope: dict[str, Any] = {"rope_theta": data.get("rope_theta", 1e4)}
    for key in ("rope_scaling", "rope_parameters"):
        section = data.get(key) or {}
        if not isinstance(section, Mapping):
            raise ValueError(f"config.json has {key} {section!r}; it must be an object.")
        rope |= section
    return rope


def _scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    sizes = {field.name for field in fields(RopeScaling)}
    left = set(rope) - {"rope_theta", "rope_type", "type"}
    if kind == "default" and not left:
        return None
    if kind != "llama3" or left != sizes:
        raise ValueError(
            f"config.json has rope_scaling {dict(rope)!r}; this decoder computes only unscaled positions, or 'llama3' "
            f"with {', '.join(sorted(sizes))}."
        )
    return RopeScaling(**{name: rope[name] for name in sizes})
