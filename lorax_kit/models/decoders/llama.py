"""LLaMA (Touvron et al., arXiv 2302.13971), pre-norm causal decoder, in Flax linen. Reads top to bottom.

Its relatives differ by configuration: Llama 3's longer positions, Mistral's window, the biases of Qwen2, the norms of
query and key of Qwen3, Gemma's GeGLU, scaled embeddings and norms of 1 + scale.

Shapes: B batch, T tokens, D hidden, H query heads, N key and value heads, K = D / H, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lorax_kit.models.cache import Cache, Past, causal, empty_cache, opened, past_of, rows_at, rows_for, slots_of
from lorax_kit.models.decoders.llama_config import LlamaConfig
from lorax_kit.models.layers import attention, gelu_tanh, in_fp32, tied_logits

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * scale over the last axis (Zhang and Sennrich, arXiv 1910.07467), in fp32.

    `shifted`: times 1 + scale.
    """

    eps: float
    dtype: Any = None
    shifted: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        start = nn.initializers.zeros if self.shifted else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), jnp.float32).astype(jnp.float32)
        scale = lax.expand_dims(1 + scale if self.shifted else scale, range(x.ndim - 1))
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps) * scale
        return y.astype(self.dtype or x.dtype)


def angles(tokens: int, config: LlamaConfig) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """cos and sin of t * theta^(-2 i / K), for place t and pair i of a head (Su et al., arXiv 2104.09864, eq. 15).

    Places are static: numpy forms the angles in float64, where fp32 is off by 5e-4 at place 8,000.
    """
    size, scaling = config.head_size, config.rope_scaling
    speed = config.rope_theta ** (-np.arange(0, size, 2) / size)
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * speed / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        speed = speed * (kept + (1 - kept) / scaling.factor)
    turn = np.outer(np.arange(tokens), speed)
    return jnp.asarray(np.cos(turn), jnp.float32), jnp.asarray(np.sin(turn), jnp.float32)


def rotate(x: Float[Array, "B H T K"], places: tuple[Array, Array]) -> Float[Array, "B H T K"]:
    """Entries i and i + K/2 of every head, turned as a pair by the angle of their place, in fp32."""
    cos, sin = (table[None, None] for table in places)  # (1, 1, T, K/2)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245) of the normalised input, added to the input."""

    config: LlamaConfig
    dtype: Any = None
    plain: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        places: tuple[Array, Array],
        seen: Bool[Array, "B 1 T S"],
        past: Past | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        c = self.config
        batch, tokens, hidden = x.shape
        heads, shared, size = c.num_attention_heads, c.num_key_value_heads, c.head_size
        y = RMSNorm(c.rms_norm_eps, self.dtype, c.gelu, name="norm")(x)

        def project(name: str, heads: int) -> Float[Array, "B heads T K"]:
            z = nn.Dense(heads * size, use_bias=c.attention_bias, dtype=self.dtype, name=name)(y)  # (B, T, heads K)
            z = z.reshape(batch, tokens, heads, size)
            if c.query_key_norm and name != "value":
                z = RMSNorm(c.rms_norm_eps, self.dtype, name=f"{name}_norm")(z)
            return z.transpose(0, 2, 1, 3)

        q, k, v = project("query", heads), project("key", shared), project("value", shared)
        q, k = rotate(q, places), rotate(k, places)
        if past is not None:
            k, v = past.extended(k, v)  # (B, N, S, K)
        # The query heads of a group stand as further rows of one head: keys and values are never repeated.
        rows = heads // shared * tokens
        y = attention(
            q.reshape(batch, shared, rows, size), k, v, jnp.tile(seen, (1, 1, heads // shared, 1)), self.plain
        )
        y = y.reshape(batch, heads, tokens, size).transpose(0, 2, 1, 3).reshape(batch, tokens, heads * size)
        return x + nn.Dense(hidden, use_bias=c.output_bias, dtype=self.dtype, name="output")(y), (k, v)


class Mlp(nn.Module):
    """SwiGLU, or GeGLU (Shazeer, arXiv 2002.05202), of the normalised input, added to the input."""

    config: LlamaConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        dense = partial(nn.Dense, use_bias=c.mlp_bias, dtype=self.dtype)
        y = RMSNorm(c.rms_norm_eps, self.dtype, c.gelu, name="norm")(x)
        bend = gelu_tanh if c.gelu else nn.silu
        y = bend(dense(c.intermediate_size, name="gate")(y)) * dense(c.intermediate_size, name="up")(y)  # (B, T, F)
        return x + dense(c.hidden_size, name="down")(y)


class Layer(nn.Module):
    """One decoder layer: attention, then feed-forward, each of a normalised input and added to it."""

    config: LlamaConfig
    dtype: Any = None
    plain: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], places: tuple[Array, Array], seen: Bool[Array, "B 1 T S"], past: Past | None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        x, kept = Attention(self.config, self.dtype, self.plain, name="attention")(x, places, seen, past)
        return Mlp(self.config, self.dtype, name="mlp")(x), kept


class LlamaModel(nn.Module):
    """Token ids to the logits of the token that follows each.

    Args of the call:
      ids: int32 (B, T).
      mask: (B, T), nonzero where a token counts; where values differ they number the texts of a packed row, none of
        which sees another. Padding may stand on either side: only distances between places matter. The logits at
        padding mean nothing.
      cache: what was read before, from `empty_cache` or the last call; None: the text begins with `ids`.
      hidden: return the normalised hidden states (B, T, D) in place of the logits; without a cache.

    Returns:
      Logits fp32 (B, T, V); with a cache, those of the last token alone, (B, V), and the new cache. The layers compute
      in `dtype` (None: that of the params), norms and softmax in fp32. `plain` leaves all derivatives to autodiff:
      slower, but also in forward mode.

    Raises:
      ValueError: more tokens, or slots of the cache, than the config has positions; hidden states with a cache.
    """

    config: LlamaConfig
    dtype: Any = None
    plain: bool = False

    def empty_cache(self, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
        """A cache for texts of up to so many tokens, padding included."""
        c = self.config
        return empty_cache(c.num_hidden_layers, batch, c.num_key_value_heads, slots, c.head_size, dtype)

    @nn.compact
    def __call__(self, ids: Int[Array, "B T"], mask: Array, cache: Cache | None = None, hidden: bool = False) -> Any:
        c = self.config
        tokens = ids.shape[1]
        rows = rows_for(slots_of(tokens, cache), c.max_position_embeddings)
        words = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, name="embeddings")
        x = words(ids)  # (B, T, D)
        x = x * jnp.asarray(c.hidden_size**0.5, x.dtype) if c.gelu else x
        cos, sin = angles(rows, c)  # (S, K/2)
        after = cache
        if cache is None:
            seen = causal(mask, c.sliding_window)  # (B, 1, T, T)
        else:
            after, seen = opened(cache, mask, c.sliding_window)  # (B, 1, T, S)
            cos, sin = (rows_at(table, cache, tokens) for table in (cos, sin))  # (T, K/2)
        kept = []
        for i in range(c.num_hidden_layers):
            layer = Layer(c, self.dtype, self.plain, name=f"layer_{i}")
            x, both = layer(x, (cos, sin), seen, past_of(cache, i))
            kept.append(both)
        x = RMSNorm(c.rms_norm_eps, self.dtype, c.gelu, name="norm")(x if cache is None else x[:, -1:])
        if hidden:
            if cache is not None:
                raise ValueError("hidden=True is for a whole text; with a cache a decoder gives logits.")
            return x
        if c.tie_word_embeddings:
            logits = tied_logits(x, words.embedding)
        else:
            logits = nn.Dense(c.vocab_size, use_bias=False, dtype=self.dtype, dot_general=in_fp32, name="head")(x)
        if after is None:
            return logits
        keys, values = zip(*kept, strict=True)
        return logits[:, 0], after._replace(keys=keys, values=values)
