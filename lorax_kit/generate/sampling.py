"""The next token from logits: greedy, or drawn from the part of the distribution that the settings leave.

    p = softmax(penalised logits / temperature), then without what top-k, top-p and min-p leave out

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.core.specs.setting import is_int, is_number, shown
from lorax_kit.errors import LoraxError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

LOW = -jnp.inf


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Args:
      temperature: logits are divided by it; 0 takes the most likely token.
      top_k: leave so many of the most likely tokens; None: all.
      top_p: of the most likely tokens leave the fewest that hold this much probability (Holtzman et al., arXiv
        1904.09751); 1: all.
      min_p: leave out what is less likely than this share of the most likely (Nguyen et al., arXiv 2407.01082).
      repetition_penalty: of tokens that the prompt or the text has, positive logits are divided by it and negative ones
        multiplied (Keskar et al., arXiv 1909.05858); 1: none. A prompt that an encoder reads is not counted.

    Raises:
      LoraxError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        checks = {
            "temperature": (0, float("inf"), "a number of at least 0"),
            "top_p": (1e-9, 1, "a number above 0, at most 1"),
            "min_p": (0, 1, "a number from 0 to 1"),
            "repetition_penalty": (1e-9, float("inf"), "a number above 0"),
        }
        for name, (low, high, wanted) in checks.items():
            x = getattr(self, name)
            if not is_number(x) or not low <= x <= high or x == float("inf"):
                raise LoraxError(f"{name} is {shown(x)}; it must be {wanted}.")
        if self.top_k is not None and (not is_int(self.top_k) or self.top_k < 1):
            raise LoraxError(f"top_k is {shown(self.top_k)}; it must be an integer of at least 1, or None.")
        if self.temperature == 0 and (self.top_k, self.top_p, self.min_p) != (None, 1.0, 0.0):
            raise LoraxError("top_k, top_p and min_p leave the most likely token alone, which temperature 0 takes.")

    @classmethod
    def from_dict(cls, data: Any) -> Sampling:
        """From JSON data.

        Raises:
          LoraxError: no object, unknown keys, a value out of range.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(data, Mapping) or set(data) - set(known):
            raise LoraxError(f"sampling is {shown(data)}; it must be an object of {', '.join(known)}.")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` is the inverse."""
        return asdict(self)

    @property
    def form(self) -> tuple[bool, bool, bool]:
        """What a program is compiled for: whether it draws, leaves tokens out, and penalises; the values are traced."""
        filters = (self.top_k, self.top_p, self.min_p) != (None, 1.0, 0.0)
        return self.temperature > 0, filters, self.repetition_penalty != 1

    def scalars(self) -> Scalars:
        """The values, for a program of this form."""
        top_k = 2**31 - 1 if self.top_k is None else self.top_k
        return Scalars(
            jnp.float32(self.temperature),
            jnp.int32(top_k),
            jnp.float32(self.top_p),
            jnp.float32(self.min_p),
            jnp.float32(self.repetition_penalty),
        )


class Scalars(NamedTuple):
    """Values of a `Sampling`, traced."""

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array


def chosen(
    logits: Float[Array, "B V"],
    scalars: Scalars,
    keys: Any,
    used: Bool[Array, "B V"] | None,
    form: tuple[bool, bool, bool],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The next token of each row, and its log-probability under the model itself, without penalty or temperature.

    Args:
      keys: (B,) random keys; read where `form` draws.
      used: which tokens each row has already; read where `form` penalises.
      form: `Sampling.form`.
    """
    draws, filters, penalises = form
    logp = jax.nn.log_softmax(logits, axis=-1)
    x = penalised(logits, used, scalars.repetition_penalty) if penalises and used is not None else logits
    if not draws:
        token = jnp.argmax(x, axis=-1).astype(jnp.int32)
    else:
        x = x / scalars.temperature
        x = left(x, scalars) if filters else x
        token = jax.vmap(jax.random.categorical)(keys, x).astype(jnp.int32)
    return token, jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]


def penalised(logits: Float[Array, "B V"], used: Bool[Array, "B V"], penalty: Float[Array, ""]) -> Float[Array, "B V"]:
    """Logits with those of used tokens made smaller."""
    return jnp.where(used, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def left(logits: Float[Array, "B V"], scalars: Scalars) -> Float[Array, "B V"]:
    """Logits with -inf for what top-k, then top-p, then min-p leave out; ties with the last that is left stay."""
    ordered = -jnp.sort(-logits, axis=-1)  # descending
    size = logits.shape[-1]
    kth = ordered[:, jnp.minimum(scalars.top_k, size) - 1][:, None]
    ordered = jnp.where(ordered >= kth, ordered, LOW)
    p = jax.nn.softmax(ordered, axis=-1)
    # A token stays where those before it hold less than p: the first always does.
    before = jnp.cumsum(p, axis=-1) - p
    least = jnp.min(jnp.where(before < scalars.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    out = jnp.where(logits >= jnp.maximum(least, kth), logits, LOW)
    share = jnp.log(scalars.min_p)
    return jnp.where(out >= jnp.max(out, axis=-1, keepdims=True) + share, out, LOW)
