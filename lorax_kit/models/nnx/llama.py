"""LLaMA and its relatives in Flax NNX: the params, their names and the numbers of `lorax_kit.models.decoders.llama`.

Shapes: B batch, T tokens, S slots, D hidden, H query heads, N key and value heads, K size of a head, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from lorax_kit.core.paths import Params, flatten
from lorax_kit.models.cache import Cache, Past, causal, empty_cache, opened, past_of, rows_at
from lorax_kit.models.decoders.llama import angles, rotate
from lorax_kit.models.decoders.llama_config import LlamaConfig
from lorax_kit.models.layers import attention, gelu_tanh, in_fp32, tied_logits

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class RMSNorm(nnx.Module):
    """x / sqrt(mean x^2 + eps) * scale over the last axis, in fp32; `shifted`: times 1 + scale."""

    def __init__(self, size: int, config: LlamaConfig) -> None:
        self.eps, self.shifted = config.rms_norm_eps, config.gelu
        self.scale = nnx.Param(jnp.full(size, 0.0 if config.gelu else 1.0, jnp.float32))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.scale[...].astype(jnp.float32)
        scale = lax.expand_dims(1 + scale if self.shifted else scale, range(x.ndim - 1))
        y = x.astype(jnp.float32)
        return (y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps) * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention of the normalised input, added to the input."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        c, size = config, config.head_size
        self.config, heads, shared = c, c.num_attention_heads * size, c.num_key_value_heads * size
        linear = partial(nnx.Linear, rngs=rngs)
        self.norm = RMSNorm(c.hidden_size, c)
        self.query = linear(c.hidden_size, heads, use_bias=c.attention_bias)
        self.key = linear(c.hidden_size, shared, use_bias=c.attention_bias)
        self.value = linear(c.hidden_size, shared, use_bias=c.attention_bias)
        self.output = linear(heads, c.hidden_size, use_bias=c.output_bias)
        if c.query_key_norm:
            self.query_norm, self.key_norm = RMSNorm(size, c), RMSNorm(size, c)

    def __call__(
        self, x: Float[Array, "B T D"], places: tuple[Array, Array], seen: Bool[Array, "B 1 T S"], past: Past | None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        c, (batch, tokens, _) = self.config, x.shape
        heads, shared, size = c.num_attention_heads, c.num_key_value_heads, c.head_size
        y = self.norm(x)
        q, k, v = (part(y).reshape(batch, tokens, -1, size) for part in (self.query, self.key, self.value))
        if c.query_key_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (z.transpose(0, 2, 1, 3) for z in (q, k, v))
        q, k = rotate(q, places), rotate(k, places)
        if past is not None:
            k, v = past.extended(k, v)  # (B, N, S, K)
        # The query heads of a group stand as further rows of one head: keys and values are never repeated.
        q = q.reshape(batch, shared, heads // shared * tokens, size)
        y = attention(q, k, v, jnp.tile(seen, (1, 1, heads // shared, 1)))
        y = y.reshape(batch, heads, tokens, size).transpose(0, 2, 1, 3).reshape(batch, tokens, heads * size)
        return x + self.output(y), (k, v)


class Mlp(nnx.Module):
    """SwiGLU, or GeGLU, of the normalised input, added to the input."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        c = config
        linear = partial(nnx.Linear, use_bias=c.mlp_bias, rngs=rngs)
        self.gelu, self.norm = c.gelu, RMSNorm(c.hidden_size, c)
        self.gate, self.up = linear(c.hidden_size, c.intermediate_size), linear(c.hidden_size, c.intermediate_size)
        self.down = linear(c.intermediate_size, c.hidden_size)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y = self.norm(x)
        return x + self.down((gelu_tanh if self.gelu else nnx.silu)(self.gate(y)) * self.up(y))


class Layer(nnx.Module):
    """One decoder layer: attention, then feed-forward."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        self.attention, self.mlp = Attention(config, rngs), Mlp(config, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], places: tuple[Array, Array], seen: Bool[Array, "B 1 T S"], past: Past | None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        x, kept = self.attention(x, places, seen, past)
        return self.mlp(x), kept


class LlamaNnx(nnx.Module):
    """Token ids to the logits of the token that follows each; a call is that of `LlamaModel`, params included.

    Example:
      >>> config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
      ...                      num_attention_heads=2, num_key_value_heads=1)
      >>> ids = jnp.ones((1, 3), jnp.int32)
      >>> LlamaNnx(config, nnx.Rngs(0))(ids, ids).shape
      (1, 3, 8)
    """

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        c = self.config = config
        self.embeddings = nnx.Embed(c.vocab_size, c.hidden_size, rngs=rngs)
        for i in range(c.num_hidden_layers):
            setattr(self, f"layer_{i}", Layer(c, rngs))
        self.norm = RMSNorm(c.hidden_size, c)
        if not c.tie_word_embeddings:
            self.head = nnx.Linear(c.hidden_size, c.vocab_size, use_bias=False, dot_general=in_fp32, rngs=rngs)

    def empty_cache(self, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
        """A cache for texts of up to so many tokens, padding included."""
        c = self.config
        return empty_cache(c.num_hidden_layers, batch, c.num_key_value_heads, slots, c.head_size, dtype)

    def __call__(self, ids: Int[Array, "B T"], mask: Array, cache: Cache | None = None) -> Any:
        c, tokens = self.config, ids.shape[1]
        slots = tokens if cache is None else cache.seen.shape[1]
        if slots > c.max_position_embeddings:
            raise ValueError(f"a text of {slots} tokens, for a decoder of {c.max_position_embeddings} positions.")
        x = self.embeddings(ids)  # (B, T, D)
        x = x * jnp.asarray(c.hidden_size**0.5, x.dtype) if c.gelu else x
        cos, sin = angles(slots, c)  # (S, K/2)
        if cache is None:
            after, seen = None, causal(mask, c.sliding_window)  # (B, 1, T, T)
        else:
            after, seen = opened(cache, mask, c.sliding_window)  # (B, 1, T, S)
            cos, sin = (rows_at(table, cache, tokens) for table in (cos, sin))  # (T, K/2)
        kept = []
        for i in range(c.num_hidden_layers):
            x, both = getattr(self, f"layer_{i}")(x, (cos, sin), seen, past_of(cache, i))
            kept.append(both)
        x = self.norm(x if cache is None else x[:, -1:])
        logits = tied_logits(x, self.embeddings.embedding[...]) if c.tie_word_embeddings else self.head(x)
        if after is None:
            return logits
        keys, values = zip(*kept, strict=True)
        return logits[:, 0], after._replace(keys=keys, values=values)


def llama_nnx(config: LlamaConfig, params: Params) -> LlamaNnx:
    """The NNX module with the params of a `LlamaModel`, or of what `load_model` gives; nothing is drawn.

    Raises:
      ValueError: params of other paths or shapes.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: LlamaNnx(config, nnx.Rngs(0))))
    given, expected = (flatten(x)[0] for x in (params, nnx.to_pure_dict(state)))
    for path in sorted({*given, *expected}):
        shapes = [x[path].shape if path in x else None for x in (given, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{path!r} has shape {shapes[0]}, the config says {shapes[1]}; None: it is not there.")
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
    model: LlamaNnx = nnx.merge(graph, state)
    return model
