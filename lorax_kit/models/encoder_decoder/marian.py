"""Marian (Junczys-Dowmunt et al., arXiv 1804.00344), the translation models of OPUS-MT, in Flax linen.

A post-norm encoder-decoder (Vaswani et al., arXiv 1706.03762) with sinusoidal positions. Reads top to bottom.

Shapes: B batch, E tokens read, T tokens written, S slots, D hidden, H heads, K = D / H, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.models.cache import Cache, Past, advanced, causal, crossed, empty_cache, opened, past_of, rows_for
from lorax_kit.models.layers import attention, gelu, tied_logits
from lorax_kit.models.stored.sizes import check_sizes, expect_whole_heads, read_sizes

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

NAMES = {
    "hidden_size": "d_model",
    "intermediate_size": "encoder_ffn_dim",
    "decoder_intermediate_size": "decoder_ffn_dim",
    "num_hidden_layers": "encoder_layers",
    "num_decoder_layers": "decoder_layers",
    "num_attention_heads": "encoder_attention_heads",
    "num_decoder_attention_heads": "decoder_attention_heads",
}
"""Our name of a size -> its name in config.json."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"swish": nn.silu, "silu": nn.silu, "gelu": gelu, "relu": nn.relu}
EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class MarianConfig:
    """Sizes of a Marian encoder-decoder, named as LLaMA's; the defaults are those of most OPUS-MT models.

    Args:
      intermediate_size, num_hidden_layers, num_attention_heads: of the encoder.
      scale_embedding: embeddings are multiplied by sqrt(hidden_size).

    Raises:
      ValueError: a size is not a number of its kind, or sizes do not fit each other.
    """

    vocab_size: int = 58101
    hidden_size: int = 512
    intermediate_size: int = 2048
    decoder_intermediate_size: int = 2048
    num_hidden_layers: int = 6
    num_decoder_layers: int = 6
    num_attention_heads: int = 8
    num_decoder_attention_heads: int = 8
    max_position_embeddings: int = 512
    activation_function: str = "swish"
    scale_embedding: bool = True

    def __post_init__(self) -> None:
        check_sizes(self)
        for heads in (self.num_attention_heads, self.num_decoder_attention_heads, 2):
            expect_whole_heads(heads, self.hidden_size)
        if self.activation_function not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation_function is {self.activation_function!r}; known are {known}.")

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.max_position_embeddings

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MarianConfig:
        """From a config.json's content.

        Raises:
          ValueError: the file lacks a size, or describes a model that this one would not compute.
        """
        only = {
            "share_encoder_decoder_embeddings": True,
            "tie_word_embeddings": True,
            "static_position_embeddings": True,
            "normalize_before": False,
            "normalize_embedding": False,
            "add_final_layer_norm": False,
        }
        absent = {"scale_embedding": False, "activation_function": "gelu"}
        return cls(**read_sizes(cls, data, ("marian",), NAMES, absent=absent, only=only))


def sinusoids(places: int, size: int) -> Float[Array, "P D"]:
    """sin(p / 10000^(2 i / D)) for place p in the first half of the columns, the cosines in the second."""
    turn = np.outer(np.arange(places), 10000.0 ** (-np.arange(0, size, 2) / size))
    return jnp.asarray(np.concatenate([np.sin(turn), np.cos(turn)], axis=1), jnp.float32)


class Attention(nn.Module):
    """Multi-head attention to itself, or to what the encoder read, with its residual and norm."""

    heads: int
    dtype: Any = None
    plain: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        seen: Bool[Array, "B 1 #T S"],
        *,
        past: Past | None = None,
        read: Float[Array, "B E D"] | None = None,
        formed: tuple[Array, Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Keys and values are of x, with those of the `past`; of what was `read`; or `formed` already."""
        hidden = x.shape[-1]

        def project(name: str, y: Float[Array, "B L D"]) -> Float[Array, "B H L K"]:
            z = nn.Dense(hidden, dtype=self.dtype, name=name)(y)
            return z.reshape(*y.shape[:2], self.heads, hidden // self.heads).transpose(0, 2, 1, 3)

        q, source = project("query", x), x if read is None else read
        k, v = (project("key", source), project("value", source)) if formed is None else formed
        if past is not None:
            k, v = past.extended(k, v)  # (B, H, S, K)
        y = attention(q, k, v, seen, self.plain).transpose(0, 2, 1, 3).reshape(x.shape)
        y = nn.Dense(hidden, dtype=self.dtype, name="output")(y)
        return nn.LayerNorm(epsilon=EPS, dtype=self.dtype, name="norm")(x + y), (k, v)


class Mlp(nn.Module):
    """The feed-forward block, with its residual and norm."""

    size: int
    activation: str
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y = ACTIVATIONS[self.activation](nn.Dense(self.size, dtype=self.dtype, name="up")(x))  # (B, T, F)
        y = nn.Dense(x.shape[-1], dtype=self.dtype, name="down")(y)
        return nn.LayerNorm(epsilon=EPS, dtype=self.dtype, name="norm")(x + y)


class EncoderLayer(nn.Module):
    """Attention, then feed-forward, each normalised after its residual."""

    config: MarianConfig
    dtype: Any = None
    plain: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B E D"], seen: Array) -> Float[Array, "B E D"]:
        c = self.config
        x, _ = Attention(c.num_attention_heads, self.dtype, self.plain, name="attention")(x, seen)
        return Mlp(c.intermediate_size, c.activation_function, self.dtype, name="mlp")(x)


class DecoderLayer(nn.Module):
    """Attention to what was written, to what was read, then feed-forward, each normalised after its residual."""

    config: MarianConfig
    dtype: Any = None
    plain: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        seen: Array,
        past: Past | None,
        read: Float[Array, "B E D"] | None,
        read_seen: Bool[Array, "B 1 1 E"],
        formed: tuple[Array, Array] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array], tuple[Array, Array]]:
        c = self.config
        heads = c.num_decoder_attention_heads
        x, own = Attention(heads, self.dtype, self.plain, name="attention")(x, seen, past=past)
        x, formed = Attention(heads, self.dtype, self.plain, name="cross")(x, read_seen, read=read, formed=formed)
        return Mlp(c.decoder_intermediate_size, c.activation_function, self.dtype, name="mlp")(x), own, formed


class Encoder(nn.Module):
    """Embedded tokens to hidden states."""

    config: MarianConfig
    dtype: Any = None
    plain: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B E D"], mask: Array) -> Float[Array, "B E D"]:
        seen = mask[:, None, None, :] != 0  # (B, 1, 1, E)
        for i in range(self.config.num_hidden_layers):
            x = EncoderLayer(self.config, self.dtype, self.plain, name=f"layer_{i}")(x, seen)
        return x


class Decoder(nn.Module):
    """Embedded tokens and what was read to hidden states, and the new cache."""

    config: MarianConfig
    dtype: Any = None
    plain: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        seen: Bool[Array, "B 1 T S"],
        read: Float[Array, "B E D"] | None,
        read_mask: Array | None,
        cache: Cache | None,
        after: Cache | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        read_seen, kept, formed = crossed(cache, read_mask), [], []
        for i in range(self.config.num_decoder_layers):
            cross = None if cache is None or cache.cross is None else cache.cross.of(i)
            layer = DecoderLayer(self.config, self.dtype, self.plain, name=f"layer_{i}")
            x, own, cross = layer(x, seen, past_of(cache, i), read, read_seen[:, None, None], cross)
            kept.append(own)
            formed.append(cross)
        return x, None if after is None else advanced(after, kept, formed, read_seen)


class MarianModel(nn.Module):
    """Token ids read, and those written, to the logits of the token that follows each.

    Args of the call:
      ids, mask: int32 (B, E) and (B, E), nonzero where a token counts: the text that is read.
      decoder_ids, decoder_mask: (B, T), the text that is written, which begins with the start token. Padding may stand
        on either side: a token's position is the number of those that count before it.

    Returns:
      Logits fp32 (B, T, V). The layers compute in `dtype` (None: that of the params), the softmax in fp32. `plain`
      leaves all derivatives to autodiff: slower, but also in forward mode.

    Raises:
      ValueError: more tokens, or slots of the cache, than the config has positions.
    """

    config: MarianConfig
    dtype: Any = None
    plain: bool = False

    def setup(self) -> None:
        """The parts, by the names of their params."""
        c = self.config
        self.embeddings = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype)
        self.encoder = Encoder(c, self.dtype, self.plain)
        self.decoder = Decoder(c, self.dtype, self.plain)
        self.final_logits_bias = self.param("final_logits_bias", nn.initializers.zeros, (1, c.vocab_size), jnp.float32)

    def __call__(
        self, ids: Int[Array, "B E"], mask: Array, decoder_ids: Int[Array, "B T"], decoder_mask: Array
    ) -> Float[Array, "B T V"]:
        logits: Array = self.decode(decoder_ids, decoder_mask, self.encode(ids, mask), mask)
        return logits

    def empty_cache(self, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
        """A cache for written texts of up to so many tokens, padding included."""
        c = self.config
        heads = c.num_decoder_attention_heads
        return empty_cache(c.num_decoder_layers, batch, heads, slots, c.hidden_size // heads, dtype)

    def _embedded(self, ids: Array, seen: Bool[Array, "B 1 #T S"]) -> Float[Array, "B T D"]:
        """Words at their places: a token's place is how many it sees up to its own, less one."""
        c = self.config
        rows = rows_for(seen.shape[-1], c.max_position_embeddings, "model")
        places = jnp.maximum(jnp.sum(seen[:, 0], axis=-1, dtype=jnp.int32) - 1, 0)  # (B, T)
        x = self.embeddings(ids)
        x = x * jnp.asarray(c.hidden_size**0.5, x.dtype) if c.scale_embedding else x
        return x + sinusoids(rows, c.hidden_size)[places].astype(x.dtype)

    def encode(self, ids: Int[Array, "B E"], mask: Array) -> Float[Array, "B E D"]:
        """Hidden states of the text that is read."""
        hidden: Array = self.encoder(self._embedded(ids, causal(mask != 0)), mask)
        return hidden

    def decode(
        self,
        ids: Int[Array, "B T"],
        mask: Array,
        hidden: Float[Array, "B E D"] | None,
        hidden_mask: Array | None,
        cache: Cache | None = None,
    ) -> Any:
        """Logits (B, T, V); with a cache those of the last token alone, (B, V), and the new cache.

        A cache that has read its first tokens holds keys and values of the text that was read: `hidden` and its mask
        are not looked at, and may be None.
        """
        after, seen = (None, causal(mask)) if cache is None else opened(cache, mask)  # (B, 1, T, S)
        x, after = self.decoder(self._embedded(ids, seen), seen, hidden, hidden_mask, cache, after)
        x = x if after is None else x[:, -1:]
        logits = tied_logits(x, self.embeddings.embedding) + self.final_logits_bias.astype(jnp.float32)[None]
        return logits if after is None else (logits[:, 0], after)
