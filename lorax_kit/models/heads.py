"""Heads on the hidden states of a pretrained model: classes of a text, first and last token of an answer, words.

Shapes: B batch, T tokens, D hidden, C classes. Everything that leaves a head is fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.models.layers import first_token, in_fp32, last_token, mean_token, tied_logits
from lorax_kit.models.stored.families import FAMILIES

if TYPE_CHECKING:
    from jaxtyping import Float

SPREAD = 0.02
"""Standard deviation of a fresh head's kernel, as in BERT."""


def fresh_head(hidden_size: int, outputs: int, key: Array) -> dict[str, Any]:
    """A head without a layer before it: a kernel (D, C) drawn from N(0, 0.02^2), a bias of zero.

    Example:
      >>> fresh_head(4, 2, jax.random.key(0))["output"]["kernel"].shape
      (4, 2)
    """
    kernel = SPREAD * jax.random.normal(key, (hidden_size, outputs), jnp.float32)
    return {"output": {"kernel": kernel, "bias": jnp.zeros(outputs, jnp.float32)}}


def classify(family: str, head: Mapping[str, Any], hidden: Float[Array, "B T D"], mask: Array) -> Float[Array, "B C"]:
    """Logits of classes.

    A head with a layer before it ("dense") reads an encoder's first token, through tanh (BERT's pooler, RoBERTa) or
    relu (DistilBERT). One without reads the last token of a decoder, and the mean over an encoder's tokens.

    Args:
      family: model_type, as `Loaded` has it.
      head: `Loaded.heads["classify"]`, or of `fresh_head`.
      hidden: of an encoder, of a decoder called with hidden=True, or of `encode`.
      mask: (B, T), nonzero where a token counts; a row of padding alone has the vector of its first token, or zero.
    """
    if "dense" in head:
        bend = nn.relu if family == "distilbert" else jnp.tanh
        return _linear(head["output"], bend(_linear(head["dense"], first_token(hidden, mask))))
    vector = last_token(hidden, mask) if FAMILIES[family].kind == "decoder" else mean_token(hidden, mask)
    return _linear(head["output"], vector)


def answer(head: Mapping[str, Any], hidden: Float[Array, "B T D"]) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Logits of each token as the first, and as the last, of an answer; those of padding are not taken out.

    Args:
      head: `Loaded.heads["answer"]`, or of `fresh_head` with two outputs.
      hidden: as in `classify`.
    """
    logits = _linear(head["output"], hidden.astype(jnp.float32))
    return logits[..., 0], logits[..., 1]


def word_logits(params: Mapping[str, Any], hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Logits of every word from a decoder's hidden states, place by place: what the decoder itself gives, bit for bit.

    Args:
      params: of the decoder; without a "head" its embeddings are the head.
      hidden: of the decoder called with hidden=True.
    """
    if "head" in params:
        return in_fp32(hidden, params["head"]["kernel"].astype(hidden.dtype), (((2,), (0,)), ((), ())))
    words = params["embeddings"]
    return tied_logits(hidden, words.get("token", words)["embedding"])


def _linear(layer: Mapping[str, Any], x: Float[Array, "*B D"]) -> Float[Array, "*B C"]:
    """x W + b, where there is a b."""
    y: Array = x @ layer["kernel"].astype(jnp.float32)
    if "bias" not in layer:
        return y
    return y + layer["bias"].astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
