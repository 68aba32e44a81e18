"""A classifier of texts by LSTM layers (Hochreiter & Schmidhuber, Neural Computation 9, 1997), in Flax linen.

Shapes: B batch, T tokens, E embedding, H hidden, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class LstmConfig:
    """Sizes of an LSTM classifier, and the share of words and of states that training drops."""

    vocab_size: int = 10000
    embedding_size: int = 128
    hidden_size: int = 128
    num_layers: int = 2
    num_classes: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embedding_size", "hidden_size", "num_layers", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1).")


class LstmClassifier(nn.Module):
    """Embedding, LSTM layers, mean over the states of the tokens that count, linear head.

    A state depends on its own token and earlier ones: padding after a text changes nothing. The kernels of the gates,
    `lstm_{i}/{i,h}{i,f,g,o}/kernel`, lead from the input (E or H, H) and from the previous state (H, H) to input gate,
    forget gate, candidate and output gate.

    Args of the call:
      ids: int32 (B, T), each text from the first place on.
      mask: (B, T), nonzero where a token counts.
      deterministic: drop nothing; False needs `rngs={"dropout": key}`.

    Returns:
      Logits (B, C).
    """

    config: LstmConfig

    @nn.compact
    def __call__(self, ids: Array, mask: Array, deterministic: bool = True) -> Float[Array, "B C"]:
        c = self.config
        x = nn.Embed(c.vocab_size, c.embedding_size, name="embedding")(ids)  # (B, T, E)
        x = nn.Dropout(c.dropout, broadcast_dims=(2,), deterministic=deterministic)(x)
        for i in range(c.num_layers):
            # Not OptimizedLSTMCell: it joins the kernels in every step, and low-rank ones then run 1.7x slower (CPU).
            x = nn.RNN(nn.LSTMCell(c.hidden_size, name=f"lstm_{i}"))(x)  # (B, T, H)
            x = nn.Dropout(c.dropout, deterministic=deterministic)(x)
        kept = (mask != 0).astype(x.dtype)[..., None]  # (B, T, 1)
        pooled = jnp.sum(x * kept, axis=1) / jnp.maximum(jnp.sum(kept, axis=1), 1)  # (B, H)
        return nn.Dense(c.num_classes, name="classifier")(pooled)
