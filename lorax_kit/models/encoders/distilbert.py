"""DistilBERT (Sanh et al., arXiv 1910.01108), BERT's encoder without types of tokens, in Flax linen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lorax_kit.models.encoders.bert import BertConfig, Layer
from lorax_kit.models.stored.sizes import read_sizes

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
}
"""Our name of a size -> its name in config.json."""


@dataclass(frozen=True, kw_only=True)
class DistilbertConfig(BertConfig):
    """Sizes of a DistilBERT encoder, named as BERT's."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DistilbertConfig:
        """From a config.json's content.

        Raises:
          ValueError: the file lacks a size, or describes an encoder that this one would not compute.
        """
        only = {"activation": "gelu"}
        absent = {"layer_norm_eps": 1e-12, "type_vocab_size": 1}
        return cls(**read_sizes(cls, data, ("distilbert",), NAMES, absent=absent, only=only))


class Embeddings(nn.Module):
    """Word and position embeddings, summed and normalised."""

    config: DistilbertConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        c = self.config
        word = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, name="word")(ids)  # (B, T, D)
        place = nn.Embed(c.max_position_embeddings, c.hidden_size, dtype=self.dtype, name="position")
        x = word + place(jnp.arange(ids.shape[1]))[None]
        return nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name="norm")(x)


class DistilbertEncoder(nn.Module):
    """Token ids to hidden states, as `BertEncoder`; types are not read.

    Args of the call:
      ids: int32 (B, T).
      mask: (B, T), nonzero where a token counts.
    """

    config: DistilbertConfig
    dtype: Any = None
    plain: bool = False

    @nn.compact
    def __call__(self, ids: Array, mask: Array, types: Array | None = None) -> Float[Array, "B T D"]:
        del types
        x = Embeddings(self.config, self.dtype, name="embeddings")(ids)
        seen = mask[:, None, None, :] != 0  # (B, 1, 1, T)
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, self.dtype, self.plain, name=f"layer_{i}")(x, seen)
        return x
