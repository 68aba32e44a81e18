"""LLaMA (Touvron et al., arXiv 2302.13971), pre-norm causal decoder, in Flax linen. Reads top to bottom.

Shapes: B batch, T tokens, D hidden, H query heads, N key and value heads, K = D / H, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lorax_kit.models.cache import Cache, Past, empty_cache, opened, past_of
from lorax_kit.models.layers import attention

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

KINDS = {"int": (int,), "float": (int, float), "bool": (bool,)}
WANTED = {"int": "an integer of at least 1", "float": "a finite number above 0", "bool": "true or false"}


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of a LLaMA decoder, named as in Hugging Face's config.json; the defaults are SmolLM2-135M's.

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

    def __post_init__(self) -> None:
        for field in fields(self):
            kind, value = str(field.type), getattr(self, field.name)
            if type(value) not in KINDS[kind] or (kind != "bool" and not 0 < value < math.inf):
                raise ValueError(f"{field.name} is {value!r}; it must be {WANTED[kind]}.")
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads):
            raise ValueError(f"{heads} heads do not divide hidden_size {self.hidden_size} into heads of an even size.")
        if heads % shared:
            raise ValueError(f"{shared} key and value heads do not divide {heads} heads into groups.")

    @property
    def head_size(self) -> int:
        """Entries of a head, K."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LlamaConfig:
        """From a config.json's content.

        What older files lack: one key and value head per head, rope_theta 10,000, a head that is not the embedding.

        Raises:
          ValueError: the file lacks a size, or describes a decoder that this one would not compute.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"config.json must be an object, not {type(data).__name__}.")
        only = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        for key, value in only.items():
            if data.get(key, value) != value:
                raise ValueError(f"config.json has {key} {data[key]!r}; this decoder computes only {value!r}.")
        given = {key: value for key, value in data.items() if value is not None}
        absent = {"num_key_value_heads": given.get("num_attention_heads"), "tie_word_embeddings": False}
        sizes: dict[str, Any] = absent | given | {"rope_theta": _rope_theta(given)}
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if sizes.get(name) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}.")
        config = cls(**{name: sizes[name] for name in names})
        if given.get("head_dim", config.head_size) != config.head_size:
            raise ValueError(
                f"config.json has head_dim {given['head_dim']!r}; this decoder computes only hidden_size / "
                f"num_attention_heads, {config.head_size}."
            )
        return config


def _rope_theta(data: Mapping[str, Any]) -> Any:
    """The base of the rotary angles; transformers writes it at the top (4) or within rope_parameters (5)."""
    rope = {"rope_theta": data.get("rope_theta", 1e4)}
    for key in ("rope_scaling", "rope_parameters"):
        found = data.get(key) or {}
        plain = isinstance(found, Mapping) and found.get("rope_type", found.get("type", "default")) == "default"
        if not plain or set(found) - {"rope_theta", "rope_type", "type"}:
            raise ValueError(f"config.json has {key} {found!r}; this decoder computes only unscaled positions.")
        rope |= found
    return rope["rope_theta"]


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * scale over the last axis (Zhang and Sennrich, arXiv 1910.07467), in fp32."""

    eps: float
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps) * scale.astype(jnp.float32)[None, None]
        return y.astype(self.dtype or x.dtype)


def angles(tokens: int, size: int, theta: float) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """cos and sin of t * theta^(-2 i / K), for place t and pair i of a head (Su et al., arXiv 2104.09864, eq. 15).

    Places are static: numpy forms the angles in float64, where fp32 is off by 5e-4 at place 8,000.
    """
    turn = np.outer(np.arange(tokens), theta ** (-np.arange(0, size, 2) / size))
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
        y = RMSNorm(c.rms_norm_eps, self.dtype, name="norm")(x)

        def project(name: str, heads: int) -> Float[Array, "B heads T K"]:
            z = nn.Dense(heads * size, use_bias=False, dtype=self.dtype, name=name)(y)  # (B, T, heads K)
            return z.reshape(batch, tokens, heads, size).transpose(0, 2, 1, 3)

        q, k, v = project("query", heads), project("key", shared), project("value", shared)
        q, k = rotate(q, places), rotate(k, places)
        if past is not None:
            k, v = past.extended(k, v)  # (B, N, S, K)
        # The query heads of a group stand as further rows of one head: keys and values are never repeated.
        rows = heads // shared * tokens
        y = attention(
            q.reshape(batch, shared, rows, size), k, v, jnp.tile(seen, (1, 1, heads // shared, 1)), self.plain
        )
        y = y.reshape(batch, heads, tokens, size).transpose(0, 2, 1, 3).reshape(batch, tokens, hidden)
        return x + nn.Dense(hidden, use_bias=False, dtype=self.dtype, name="output")(y), (k, v)


class Mlp(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202) of the normalised input, added to the input."""

    config: LlamaConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype)
        y = RMSNorm(c.rms_norm_eps, self.dtype, name="norm")(x)
        y = nn.silu(dense(c.intermediate_size, name="gate")(y)) * dense(c.intermediate_size, name="up")(y)  # (B, T, F)
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
      mask: (B, T), nonzero where a token counts. Padding may stand on either side: only distances between places
        matter. The logits at padding mean nothing.
      cache: what was read before, from `empty_cache` or the last call; None: the text begins with `ids`.

    Returns:
      Logits fp32 (B, T, V); with a cache, those of the last token alone, (B, V), and the new cache. The layers compute
      in `dtype` (None: that of the params), norms and softmax in fp32. `plain` leaves all derivatives to autodiff:
      slower, but also in forward mode.

    Raises:
      ValueError: more tokens, or slots of the cache, than the config has positions.
    """

    config: LlamaConfig
    dtype: Any = None
    plain: bool = False

    def empty_cache(self, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
        """A cache for texts of up to so many tokens, padding included."""
        c = self.config
        return empty_cache(c.num_hidden_layers, batch, c.num_key_value_heads, slots, c.head_size, dtype)

    @nn.compact
    def __call__(self, ids: Int[Array, "B T"], mask: Array, cache: Cache | None = None) -> Any:
        c = self.config
        tokens = ids.shape[1]
        slots = tokens if cache is None else cache.seen.shape[1]
        if slots > c.max_position_embeddings:
            raise ValueError(f"a text of {slots} tokens, for a decoder of {c.max_position_embeddings} positions.")
        words = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, name="embeddings")
        x = words(ids)  # (B, T, D)
        cos, sin = angles(slots, c.head_size, c.rope_theta)  # (S, K/2)
        after = cache
        if cache is None:
            seen = jnp.tri(tokens, dtype=bool)[None, None] & mask.astype(bool)[:, None, None, :]  # (B, 1, T, T)
        else:
            after, seen = opened(cache, mask)  # (B, 1, T, S)
            cos, sin = (lax.dynamic_slice_in_dim(table, cache.end, tokens) for table in (cos, sin))  # (T, K/2)
        kept = []
        for i in range(c.num_hidden_layers):
            layer = Layer(c, self.dtype, self.plain, name=f"layer_{i}")
            x, both = layer(x, (cos, sin), seen, past_of(cache, i))
            kept.append(both)
        x = RMSNorm(c.rms_norm_eps, self.dtype, name="norm")(x if cache is None else x[:, -1:])
        # Rounding logits of 50,000 words to bf16 would tie the best of them: products are summed and kept in fp32.
        product = partial(lax.dot_general, preferred_element_type=jnp.float32)
        if c.tie_word_embeddings:
            logits = product(x, words.embedding.astype(x.dtype), (((2,), (1,)), ((), ())))
        else:
            logits = nn.Dense(c.vocab_size, use_bias=False, dtype=self.dtype, dot_general=product, name="head")(x)
        if after is None:
            return logits
        keys, values = zip(*kept, strict=True)
        return logits[:, 0], after._replace(keys=keys, values=values)
