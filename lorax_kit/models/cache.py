"""Keys and values of the tokens that a decoder has read, so that its next step reads only what is new.

Slots are filled where they lie; or, for programs whose sizes are found as they run (ONNX), the cache grows by what is
read: its `end` is None, and every slot is filled.

Shapes: L layers, B rows, N key and value heads, S slots, T new tokens, K size of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Cross(NamedTuple):
    """What a decoder attends to in the encoder's text, formed once.

    Attributes:
      keys, values: a layer each, (B, N, E, K), of the E tokens that the encoder has read.
      seen: (B, E), which of them count.
    """

    keys: tuple[Float[Array, "B N E K"], ...]
    values: tuple[Float[Array, "B N E K"], ...]
    seen: Bool[Array, "B E"]

    def of(self, layer: int) -> tuple[Array, Array]:
        """Keys and values of one layer."""
        return self.keys[layer], self.values[layer]


class Cache(NamedTuple):
    """What a decoder has read. Row and slot are a token's place; all rows have read as many slots, padding included.

    Attributes:
      keys, values: a layer each, (B, N, S, K).
      seen: (B, S), which slots hold a token that counts.
      end: int32 (), how many slots are filled; None: all of them, and the cache grows.
      cross: of an encoder-decoder, once it has read its first tokens; before, and of other decoders, None.
    """

    keys: tuple[Float[Array, "B N S K"], ...]
    values: tuple[Float[Array, "B N S K"], ...]
    seen: Bool[Array, "B S"]
    end: Int[Array, ""] | None
    cross: Cross | None = None


def empty_cache(layers: int, batch: int, heads: int, slots: int, size: int, dtype: Any = jnp.float32) -> Cache:
    """A cache of zeros that has read nothing."""
    shape = (batch, heads, slots, size)
    zeros = [tuple(jnp.zeros(shape, dtype) for _ in range(layers)) for _ in range(2)]
    return Cache(zeros[0], zeros[1], jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))


def slots_of(tokens: int, cache: Cache | None) -> int:
    """How many slots there are once T new tokens are read; symbolic where a program's sizes are."""
    return tokens if cache is None else cache.seen.shape[1] + (tokens if cache.end is None else 0)


def rows_for(slots: int, longest: int, what: str = "decoder") -> int:
    """Rows of a table with one for each place: the slots, or the longest text where their number is symbolic.

    Raises:
      ValueError: more slots than the longest text has.
    """
    if not isinstance(slots, int):
        return longest
    if slots > longest:
        raise ValueError(f"a text of {slots} tokens, for a {what} of {longest} positions.")
    return slots


def places_of(cache: Cache, tokens: int) -> Int[Array, " T"]:
    """The slots that the next tokens take."""
    new = jnp.arange(tokens, dtype=jnp.int32)
    return (cache.seen.shape[1] if cache.end is None else cache.end) + new


def rows_at(table: Float[Array, "S K"], cache: Cache, tokens: int) -> Float[Array, "T K"]:
    """The rows of a table by place, of the places of the next tokens."""
    if cache.end is None:
        return jnp.take(table, places_of(cache, tokens), axis=0)
    return lax.dynamic_slice_in_dim(table, cache.end, tokens)


def causal(mask: Int[Array, "B T"], window: int | None = None) -> Bool[Array, "B 1 T T"]:
    """What each token sees without a cache: itself and those before it that count and have its value of the mask.

    Args:
      mask: 0 where a token does not count; other values number the texts of a packed row.
      window: how many places a token sees, its own among them; None: all.
    """
    places = jnp.arange(mask.shape[1], dtype=jnp.int32)
    same = (mask[:, :, None] == mask[:, None, :]) & mask[:, None, :].astype(bool)  # (B, T, T)
    return (_before(places, places, window)[None] & same)[:, None]


def opened(cache: Cache, mask: Int[Array, "B T"], window: int | None = None) -> tuple[Cache, Bool[Array, "B 1 T S"]]:
    """The cache with T more slots filled, and what each new token sees: itself and what counts before it.

    More tokens than there are free slots overwrite the last ones without a word: the caller counts.
    """
    tokens, end = mask.shape[1], cache.end
    if end is None:
        seen = jnp.concatenate([cache.seen, mask.astype(bool)], axis=1)
    else:
        seen = lax.dynamic_update_slice_in_dim(cache.seen, mask.astype(bool), end, axis=1)
    slots = jnp.arange(seen.shape[1], dtype=jnp.int32)
    before = _before(places_of(cache, tokens), slots, window)  # (T, S)
    after = cache._replace(seen=seen, end=None if end is None else end + tokens)
    return after, before[None, None] & seen[:, None, None]


def _before(places: Int[Array, " T"], others: Int[Array, " S"], window: int | None) -> Bool[Array, "T S"]:
    ahead = places[:, None] - others[None]
    return ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)


class Past(NamedTuple):
    """What one layer has read: keys and values (B, N, S, K), and how many slots are filled (None: all)."""

    keys: Float[Array, "B N S K"]
    values: Float[Array, "B N S K"]
    end: Int[Array, ""] | None

    def extended(self, k: Float[Array, "B N T K"], v: Float[Array, "B N T K"]) -> tuple[Array, Array]:
        """Keys and values of all slots, those of T new tokens written after what was there."""
        pairs = ((self.keys, k), (self.values, v))
        if self.end is None:
            return tuple(jnp.concatenate([x, y.astype(x.dtype)], axis=2) for x, y in pairs)  # type: ignore[return-value]
        keys, values = (lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), self.end, axis=2) for x, y in pairs)
        return keys, values


def past_of(cache: Cache | None, layer: int) -> Past | None:
    """The part of one layer."""
    return None if cache is None else Past(cache.keys[layer], cache.values[layer], cache.end)


def crossed(cache: Cache | None, mask: Int[Array, "B E"] | None) -> Bool[Array, "B E"]:
    """Which tokens of the text that was read count: as the cache has it, or, before it does, as the mask says.

    Raises:
      ValueError: neither does.
    """
    if cache is not None and cache.cross is not None:
        return cache.cross.seen
    if mask is None:
        raise ValueError(
            "decode got neither hidden states of the text to read nor a cache that has read it.\n"
            "  give hidden and hidden_mask in the first call: encode(ids, mask) forms them"
        )
    return mask != 0


def advanced(
    after: Cache, own: list[tuple[Array, Array]], cross: list[tuple[Array, Array]], read: Bool[Array, "B E"]
) -> Cache:
    """The cache of an encoder-decoder after a call: keys and values of each layer's own text, and of the text read."""
    keys, values = zip(*own, strict=True)
    read_keys, read_values = zip(*cross, strict=True)
    return after._replace(keys=keys, values=values, cross=Cross(read_keys, read_values, read))
