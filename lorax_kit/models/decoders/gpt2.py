"""GPT-2 (Radford et al., 2019), pre-norm causal decoder with learned positions, in Flax linen. Reads top to bottom.

Shapes: B batch, T tokens, S slots, D hidden, H heads, K = D / H, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lorax_kit.models.cache import Cache, Past, causal, empty_cache, opened, past_of, rows_for, slots_of
from lorax_kit.models.layers import attention, gelu, gelu_tanh, in_fp32, tied_logits
from lorax_kit.models.stored.sizes import check_sizes, expect_whole_heads, read_sizes

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
}
"""Our name of a size -> its name in config.json."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu": gelu,
    "relu": nn.relu,
}


@dataclass(frozen=True, kw_only=True)
class Gpt2Config:
    """Sizes of a GPT-2 decoder, named as LLaMA's; the defaults are those of the smallest GPT-2.

    Raises:
      ValueError: a size is not a number of its kind, or sizes do not fit each other.
    """

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-5
    activation_function: str = "gelu_new"
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        check_sizes(self)
        expect_whole_heads(self.num_attention_heads, self.hidden_size)
        if self.activation_function not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation_function is {self.activation_function!r}; known are {known}.")

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.max_position_embeddings

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Gpt2Config:
        """From a config.json's content.

        Raises:
          ValueError: the file lacks a size, or describes a decoder that this one would not compute.
        """
        width = data.get("n_embd") if isinstance(data, Mapping) else None
        absent = {"tie_word_embeddings": True, "activation_function": "gelu_new", "layer_norm_eps": 1e-5}
        if type(width) is int:
            absent["intermediate_size"] = 4 * width
        only = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
        return cls(**read_sizes(cls, data, ("gpt2",), NAMES, absent=absent, only=only))


class Attention(nn.Module):
    """Multi-head self-attention of the normalised input, added to the input."""

    config: Gpt2Config
    dtype: Any = None
    plain: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], seen: Bool[Array, "B 1 T S"], past: Past | None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        c = self.config
        batch, tokens, hidden = x.shape
        heads, size = c.num_attention_heads, hidden // c.num_attention_heads
        y = nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name="norm")(x)

        def project(name: str) -> Float[Array, "B H T K"]:
            z = nn.Dense(hidden, dtype=self.dtype, name=name)(y)  # (B, T, D)
            return z.reshape(batch, tokens, heads, size).transpose(0, 2, 1, 3)

        q, k, v = project("query"), project("key"), project("value")
        if past is not None:
            k, v = past.extended(k, v)  # (B, H, S, K)
        y = attention(q, k, v, seen, self.plain).transpose(0, 2, 1, 3).reshape(batch, tokens, hidden)
        return x + nn.Dense(hidden, dtype=self.dtype, name="output")(y), (k, v)


class Mlp(nn.Module):
    """The feed-forward block of the normalised input, added to the input."""

    config: Gpt2Config
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        y = nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name="norm")(x)
        y = ACTIVATIONS[c.activation_function](nn.Dense(c.intermediate_size, dtype=self.dtype, name="up")(y))
        return x + nn.Dense(c.hidden_size, dtype=self.dtype, name="down")(y)


class Layer(nn.Module):
    """One decoder layer: attention, then feed-forward, each of a normalised input and added to it."""

    config: Gpt2Config
    dtype: Any = None
    plain: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], seen: Bool[Array, "B 1 T S"], past: Past | None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        x, kept = Attention(self.config, self.dtype, self.plain, name="attention")(x, seen, past)
        return Mlp(self.config, self.dtype, name="mlp")(x), kept


class Embeddings(nn.Module):
    """Token and position embeddings, summed; the logits, where the head is tied to the tokens."""

    config: Gpt2Config
    dtype: Any = None

    def setup(self) -> None:
        """The two tables."""
        c = self.config
        self.token = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype)
        self.position = nn.Embed(c.max_position_embeddings, c.hidden_size, dtype=self.dtype)

    def __call__(self, ids: Int[Array, "B T"], places: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.token(ids) + self.position(places)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Products with every token's embedding, fp32."""
        return tied_logits(x, self.token.embedding)


class Gpt2Model(nn.Module):
    """Token ids to the logits of the token that follows each.

    Args of the call:
      ids: int32 (B, T).
      mask: (B, T), nonzero where a token counts; where values differ they number the texts of a packed row, none of
        which sees another. Padding may stand on either side: a token's position is the number of those that count
        before it in its text. The logits at padding mean nothing.
      cache: what was read before, from `empty_cache` or the last call; None: the text begins with `ids`.
      hidden: return the normalised hidden states (B, T, D) in place of the logits; without a cache.

    Returns:
      Logits fp32 (B, T, V); with a cache, those of the last token alone, (B, V), and the new cache. The layers compute
      in `dtype` (None: that of the params), the softmax in fp32. `plain` leaves all derivatives to autodiff: slower,
      but also in forward mode.

    Raises:
      ValueError: more tokens, or slots of the cache, than the config has positions; hidden states with a cache.
    """

    config: Gpt2Config
    dtype: Any = None
    plain: bool = False

    def empty_cache(self, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
        """A cache for texts of up to so many tokens, padding included."""
        c = self.config
        heads = c.num_attention_heads
        return empty_cache(c.num_hidden_layers, batch, heads, slots, c.hidden_size // heads, dtype)

    @nn.compact
    def __call__(self, ids: Int[Array, "B T"], mask: Array, cache: Cache | None = None, hidden: bool = False) -> Any:
        c = self.config
        rows_for(slots_of(ids.shape[1], cache), c.max_position_embeddings)  # checks
        after, seen = (None, causal(mask)) if cache is None else opened(cache, mask)  # (B, 1, T, S)
        places = jnp.maximum(jnp.sum(seen[:, 0], axis=-1, dtype=jnp.int32) - 1, 0)  # (B, T)
        words = Embeddings(c, self.dtype, name="embeddings")
        x, kept = words(ids, places), []  # (B, T, D)
        for i in range(c.num_hidden_layers):
            x, both = Layer(c, self.dtype, self.plain, name=f"layer_{i}")(x, seen, past_of(cache, i))
            kept.append(both)
        norm = nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name="norm")
        x = norm(x if cache is None else x[:, -1:])
        if hidden:
            if cache is not None:
                raise ValueError("hidden=True is for a whole text; with a cache a decoder gives logits.")
            return x
        if c.tie_word_embeddings:
            logits = words.logits(x)
        else:
            logits = nn.Dense(c.vocab_size, use_bias=False, dtype=self.dtype, dot_general=in_fp32, name="head")(x)
        if after is None:
            return logits
        keys, values = zip(*kept, strict=True)
        return logits[:, 0], after._replace(keys=keys, values=values)
