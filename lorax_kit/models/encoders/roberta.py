"""RoBERTa (Liu et al., arXiv 1907.11692), BERT's encoder with places counted from the padding id, in Flax linen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lorax_kit.models.encoders.bert import COMPUTED, BertConfig, Layer
from lorax_kit.models.stored.names import ROBERTAS
from lorax_kit.models.stored.sizes import check_sizes, expect_whole_heads, read_sizes

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """Sizes of a RoBERTa encoder, named as in Hugging Face's config.json.

    Args:
      pad_token_id: the place of padding: the first token stands at the place after it.
    """

    pad_token_id: int = 1

    def __post_init__(self) -> None:
        check_sizes(self, may_be_zero=("pad_token_id",))
        expect_whole_heads(self.num_attention_heads, self.hidden_size)
        if self.longest < 1:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}, of {self.max_position_embeddings} positions: places are counted "
                "from the one after it, and none is left."
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RobertaConfig:
        """From a config.json's content.

        Raises:
          ValueError: the file lacks a size, or describes an encoder that this one would not compute.
        """
        return cls(**read_sizes(cls, data, ROBERTAS, {}, absent={}, only=COMPUTED))

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.max_position_embeddings - self.pad_token_id - 1


class Embeddings(nn.Module):
    """Word, position and type embeddings, summed and normalised."""

    config: RobertaConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, ids: Int[Array, "B T"], mask: Array, types: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        c = self.config
        word = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, name="word")(ids)  # (B, T, D)
        counts = (mask != 0).astype(jnp.int32)
        places = jnp.cumsum(counts, axis=1) * counts + c.pad_token_id  # (B, T)
        place = nn.Embed(c.max_position_embeddings, c.hidden_size, dtype=self.dtype, name="position")(places)
        kind = nn.Embed(c.type_vocab_size, c.hidden_size, dtype=self.dtype, name="type")(types)
        return nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name="norm")(word + place + kind)


class RobertaEncoder(nn.Module):
    """Token ids to hidden states, as `BertEncoder`; padding may stand on either side.

    Args of the call:
      ids: int32 (B, T).
      mask: (B, T), nonzero where a token counts.
      types: int32 (B, T), of models that have more than one; None for all zero.
    """

    config: RobertaConfig
    dtype: Any = None
    plain: bool = False

    @nn.compact
    def __call__(self, ids: Array, mask: Array, types: Array | None = None) -> Float[Array, "B T D"]:
        if types is None or self.config.type_vocab_size == 1:
            types = jnp.zeros_like(ids)
        x = Embeddings(self.config, self.dtype, name="embeddings")(ids, mask, types)
        seen = mask[:, None, None, :] != 0  # (B, 1, 1, T)
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, self.dtype, self.plain, name=f"layer_{i}")(x, seen)
        return x
