"""IA3: W' = l * W, l over the outputs, or the inputs of feed-forward (Liu et al., arXiv 2205.05638, section 3.3).

Symbols: l is `gain`, (*stack, *out), or (*stack, *in) with `feedforward`.

The gain multiplies the parameter alone. Where it is over outputs PEFT multiplies the module's bias by it, too; here a
bias is a parameter of its own, and stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array

from lorax_kit.core.leaves import wide
from lorax_kit.core.method import Hints, Method, Update
from lorax_kit.core.plan import Site
from lorax_kit.core.setting import Setting, need


@dataclass(frozen=True, kw_only=True)
class IA3(Setting):
    """Multiply what a parameter gives, or what it is given, by one trained vector (Liu et al., arXiv 2205.05638).

    Args:
      feedforward: over the inputs instead of the outputs, as the paper has it for the second layer of a
        feed-forward block: its inputs are the block's activations.
      dtype: of the gain, at least float32.
      inputs: as in `LoRA`.
    """

    feedforward: bool = False
    kind: ClassVar[str] = "ia3"

    def __post_init__(self, *_: Any) -> None:
        super().__post_init__()
        need(isinstance(self.feedforward, bool), f"feedforward is {self.feedforward!r}; it must be true or false.")


class IA3Leaves(NamedTuple):
    """The leaf of IA3.

    Attributes:
      gain: (*stack, *out), or (*stack, *in) with `feedforward`; at least fp32.
    """

    gain: Array


def init(site: Site, w: Array, key: Array, hints: Hints) -> IA3Leaves:
    """Ones: nothing is drawn."""
    own = site.in_shape if site.setting.feedforward else site.out_shape  # type: ignore[attr-defined]
    return IA3Leaves(jnp.ones((*site.stack_shape, *own), wide(site.setting.dtype)))


def update(site: Site, w: Array, leaves: IA3Leaves, scale: Any) -> Update:
    """A gain alone."""
    if site.setting.feedforward:  # type: ignore[attr-defined]
        return Update(in_gain=leaves.gain)
    return Update(out_gain=leaves.gain)


IA3_METHOD = Method(setting=IA3, leaves=IA3Leaves, init=init, update=update, gains=frozenset({"gain"}))
