"""T5 (Raffel et al., arXiv 1910.10683), pre-norm encoder-decoder with relative positions, in Flax linen.

Shapes: B batch, E tokens read, T tokens written, S slots, D hidden, H heads, K size of a head, F feed-forward,
V vocabulary. Reads top to bottom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.models.cache import Cache, Past, advanced, causal, crossed, empty_cache, opened, past_of, places_of
from lorax_kit.models.decoders.llama import RMSNorm
from lorax_kit.models.layers import attention, gelu_tanh, in_fp32, tied_logits
from lorax_kit.models.stored.sizes import check_sizes, read_sizes

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

NAMES = {
    "hidden_size": "d_model",
    "head_size": "d_kv",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "buckets": "relative_attention_num_buckets",
    "furthest": "relative_attention_max_distance",
    "layer_norm_eps": "layer_norm_epsilon",
}
"""Our name of a size -> its name in config.json."""

FORWARD: dict[str, tuple[Callable[[Array], Array], bool]] = {
    "relu": (nn.relu, False),
    "gated-gelu": (gelu_tanh, True),
    "gated-silu": (nn.silu, True),
}
"""feed_forward_proj -> the activation, and whether it gates a second product (Shazeer, arXiv 2002.05202)."""


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """Sizes of a T5 encoder-decoder, named as LLaMA's; the defaults are T5-small's.

    Args:
      num_hidden_layers: of the encoder.
      buckets, furthest: of relative positions: how many there are, and the distance from which all share one.
      tie_word_embeddings: the head is the embedding.
      scale_decoder_outputs: hidden states are divided by sqrt(hidden_size) before the head (T5 1.0, not 1.1).

    Raises:
      ValueError: a size is not a number of its kind, or a feed-forward block that is not known.
    """

    vocab_size: int = 32128
    hidden_size: int = 512
    head_size: int = 64
    intermediate_size: int = 2048
    num_hidden_layers: int = 6
    num_decoder_layers: int = 6
    num_attention_heads: int = 8
    buckets: int = 32
    furthest: int = 128
    layer_norm_eps: float = 1e-6
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.feed_forward_proj not in FORWARD:
            raise ValueError(f"feed_forward_proj is {self.feed_forward_proj!r}; known are {', '.join(FORWARD)}.")
        if self.buckets % 4 or self.furthest <= self.buckets // 2:
            raise ValueError(
                f"{self.buckets} buckets of relative positions up to {self.furthest}: their number must be a multiple "
                "of 4, and half of it below the furthest."
            )

    @property
    def longest(self) -> None:
        """Tokens of the longest text: there is no limit."""
        return None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> T5Config:
        """From a config.json's content.

        Older files say by tie_word_embeddings alone whether hidden states are divided before the head.

        Raises:
          ValueError: the file lacks a size, or describes a model that this one would not compute.
        """
        given = data if isinstance(data, Mapping) else {}
        absent = {
            "num_decoder_layers": given.get("num_layers"),
            "buckets": 32,
            "furthest": 128,
            "feed_forward_proj": "relu",
            "tie_word_embeddings": True,
            "scale_decoder_outputs": given.get("tie_word_embeddings", True),
        }
        return cls(**read_sizes(cls, data, ("t5", "mt5"), NAMES, absent=absent, only={}))


def buckets_of(distances: int, buckets: int, furthest: int) -> np.ndarray:
    """The bucket of each distance 0, 1, ...: half of the buckets hold one each, the rest ever more, by its logarithm.

    In fp32, as T5 was trained: which of two buckets a distance at their border falls in depends on the rounding.
    """
    exact, d = buckets // 2, np.arange(distances)
    share = np.log(np.maximum(d, exact).astype(np.float32) / np.float32(exact)) / np.float32(math.log(furthest / exact))
    far = exact + (share * np.float32(buckets - exact)).astype(np.int32)
    return np.where(d < exact, d, np.minimum(far, buckets - 1)).astype(np.int32)


def position_bias(
    table: nn.Embed, config: T5Config, queries: Int[Array, " T"], keys: Int[Array, " S"], both_sides: bool
) -> Float[Array, "1 H T S"]:
    """What a head adds to the score of a key at a distance from the query, learned by bucket."""
    ahead = keys[None] - queries[:, None]  # (T, S)
    count = config.buckets // 2 if both_sides else config.buckets
    distance = jnp.abs(ahead) if both_sides else jnp.maximum(-ahead, 0)
    far = config.furthest  # and what is further falls in the same bucket
    bucket = jnp.asarray(buckets_of(far + 1, count, far))[jnp.minimum(distance, far)]
    if both_sides:
        bucket = bucket + jnp.where(ahead > 0, count, 0).astype(jnp.int32)
    return table(bucket).transpose(2, 0, 1)[None].astype(jnp.float32)


class Attention(nn.Module):
    """Attention of the normalised input to itself, or to what the encoder read, added to the input; no scale."""

    config: T5Config
    dtype: Any = None
    plain: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        seen: Bool[Array, "B 1 #T S"],
        bias: Float[Array, "1 H T S"] | None,
        *,
        past: Past | None = None,
        read: Float[Array, "B E D"] | None = None,
        formed: tuple[Array, Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Keys and values are of x, with those of the `past`; of what was `read`; or `formed` already."""
        c = self.config
        heads, size = c.num_attention_heads, c.head_size
        y = RMSNorm(c.layer_norm_eps, self.dtype, name="norm")(x)

        def project(name: str, y: Float[Array, "B L D"]) -> Float[Array, "B H L K"]:
            z = nn.Dense(heads * size, use_bias=False, dtype=self.dtype, name=name)(y)
            return z.reshape(*y.shape[:2], heads, size).transpose(0, 2, 1, 3)

        q, source = project("query", y), y if read is None else read
        k, v = (project("key", source), project("value", source)) if formed is None else formed
        if past is not None:
            k, v = past.extended(k, v)  # (B, H, S, K)
        y = attention(q, k, v, seen, self.plain, bias=bias, scale=1.0).transpose(0, 2, 1, 3)
        y = y.reshape(*x.shape[:2], heads * size)
        return x + nn.Dense(c.hidden_size, use_bias=False, dtype=self.dtype, name="output")(y), (k, v)


class Mlp(nn.Module):
    """The feed-forward block of the normalised input, gated or not, added to the input."""

    config: T5Config
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        bend, gated = FORWARD[c.feed_forward_proj]
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype)
        y = RMSNorm(c.layer_norm_eps, self.dtype, name="norm")(x)
        up = dense(c.intermediate_size, name="up")(y)  # (B, T, F)
        y = bend(dense(c.intermediate_size, name="gate")(y)) * up if gated else bend(up)
        return x + dense(c.hidden_size, name="down")(y)


class EncoderLayer(nn.Module):
    """Attention, then feed-forward."""

    config: T5Config
    dtype: Any = None
    plain: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B E D"], seen: Array, bias: Array) -> Float[Array, "B E D"]:
        x, _ = Attention(self.config, self.dtype, self.plain, name="attention")(x, seen, bias)
        return Mlp(self.config, self.dtype, name="mlp")(x)


class DecoderLayer(nn.Module):
    """Attention to what was written, to what was read, then feed-forward."""

    config: T5Config
    dtype: Any = None
    plain: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        seen: Array,
        bias: Array,
        past: Past | None,
        read: Float[Array, "B E D"] | None,
        read_seen: Bool[Array, "B 1 1 E"],
        formed: tuple[Array, Array] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array], tuple[Array, Array]]:
        x, own = Attention(self.config, self.dtype, self.plain, name="attention")(x, seen, bias, past=past)
        cross = Attention(self.config, self.dtype, self.plain, name="cross")
        x, formed = cross(x, read_seen, None, read=read, formed=formed)
        return Mlp(self.config, self.dtype, name="mlp")(x), own, formed


class Encoder(nn.Module):
    """Embedded tokens to normalised hidden states."""

    config: T5Config
    dtype: Any = None
    plain: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B E D"], mask: Array) -> Float[Array, "B E D"]:
        c, places = self.config, jnp.arange(x.shape[1], dtype=jnp.int32)
        table = nn.Embed(c.buckets, c.num_attention_heads, dtype=self.dtype, name="relative")
        bias, seen = position_bias(table, c, places, places, both_sides=True), mask[:, None, None, :] != 0
        for i in range(c.num_hidden_layers):
            x = EncoderLayer(c, self.dtype, self.plain, name=f"layer_{i}")(x, seen, bias)
        return RMSNorm(c.layer_norm_eps, self.dtype, name="norm")(x)


class Decoder(nn.Module):
    """Embedded tokens and what was read to normalised hidden states, and the new cache."""

    config: T5Config
    dtype: Any = None
    plain: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Array,
        read: Float[Array, "B E D"] | None,
        read_mask: Array | None,
        cache: Cache | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        c, tokens = self.config, x.shape[1]
        after, seen = (None, causal(mask)) if cache is None else opened(cache, mask)  # (B, 1, T, S)
        places = jnp.arange(tokens, dtype=jnp.int32) if cache is None else places_of(cache, tokens)
        read_seen = crossed(cache, read_mask)  # (B, E)
        table = nn.Embed(c.buckets, c.num_attention_heads, dtype=self.dtype, name="relative")
        bias = position_bias(table, c, places, jnp.arange(seen.shape[-1], dtype=jnp.int32), both_sides=False)
        kept, formed = [], []
        for i in range(c.num_decoder_layers):
            cross = None if cache is None or cache.cross is None else cache.cross.of(i)
            layer = DecoderLayer(c, self.dtype, self.plain, name=f"layer_{i}")
            x, own, cross = layer(x, seen, bias, past_of(cache, i), read, read_seen[:, None, None], cross)
            kept.append(own)
            formed.append(cross)
        x = RMSNorm(c.layer_norm_eps, self.dtype, name="norm")(x)
        return x, None if after is None else advanced(after, kept, formed, read_seen)


class T5Model(nn.Module):
    """Token ids read, and those written, to the logits of the token that follows each.

    Args of the call:
      ids, mask: int32 (B, E) and (B, E), nonzero where a token counts: the text that is read.
      decoder_ids, decoder_mask: (B, T), the text that is written, which begins with the start token. Padding may stand
        on either side.

    Returns:
      Logits fp32 (B, T, V). The layers compute in `dtype` (None: that of the params), norms and softmax in fp32.
      `plain` leaves all derivatives to autodiff: slower, but also in forward mode.
    """

    config: T5Config
    dtype: Any = None
    plain: bool = False

    def setup(self) -> None:
        """The parts, by the names of their params."""
        c = self.config
        self.embeddings = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype)
        self.encoder = Encoder(c, self.dtype, self.plain)
        self.decoder = Decoder(c, self.dtype, self.plain)
        if not c.tie_word_embeddings:
            self.head = nn.Dense(c.vocab_size, use_bias=False, dtype=self.dtype, dot_general=in_fp32)

    def __call__(
        self, ids: Int[Array, "B E"], mask: Array, decoder_ids: Int[Array, "B T"], decoder_mask: Array
    ) -> Float[Array, "B T V"]:
        logits: Array = self.decode(decoder_ids, decoder_mask, self.encode(ids, mask), mask)
        return logits

    def empty_cache(self, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
        """A cache for written texts of up to so many tokens, padding included."""
        c = self.config
        return empty_cache(c.num_decoder_layers, batch, c.num_attention_heads, slots, c.head_size, dtype)

    def encode(self, ids: Int[Array, "B E"], mask: Array) -> Float[Array, "B E D"]:
        """Hidden states of the text that is read."""
        hidden: Array = self.encoder(self.embeddings(ids), mask)
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
        x, after = self.decoder(self.embeddings(ids), mask, hidden, hidden_mask, cache)
        x = x if after is None else x[:, -1:]
        if self.config.scale_decoder_outputs:
            x = x * jnp.asarray(self.config.hidden_size**-0.5, x.dtype)
        logits = tied_logits(x, self.embeddings.embedding) if self.config.tie_word_embeddings else self.head(x)
        return logits if after is None else (logits[:, 0], after)
