"""IA3: W' = l * W, l over the outputs, or the inputs of feed-forward (Liu et al., arXiv 2205.05638, section 3.3).

Symbols: l is `gain`, (*stack, *out), or (*stack, *in) with `feedforward`.

The gain multiplies the parameter alone. Where it is over outputs PEFT multiplies the module's bias by it, too; here a
bias is a parameter of its own, and stays as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array

from lorax_kit.arrays.dtypes import wide
from lorax_kit.core.method import Hints, Method, Update
from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import Setting, need, shown
from lorax_kit.errors import AdapterError
from lorax_kit.peft_form import FromPeft, PeftForm, TorchModule


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
        need(isinstance(self.feedforward, bool), f"feedforward is {shown(self.feedforward)}; it must be true or false.")


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


def _feedforward(m: TorchModule) -> bool:
    """By PEFT's rule: a pattern of the whole name, or any end of it, dot or not."""
    given = m.config["feedforward_modules"]
    if isinstance(given, str):
        try:
            return re.fullmatch(given, m.name) is not None
        except re.error as e:
            raise AdapterError(f"feedforward_modules is {given!r}, not a regular expression: {e}.") from None
    ok = given is None or (isinstance(given, list | tuple) and all(isinstance(x, str) for x in given))
    need(ok, f"feedforward_modules is {given!r}; it must be a pattern, or a list of names of modules.")
    return any(m.name.endswith(entry) for entry in given or ())


def _shape(m: TorchModule, feedforward: bool) -> tuple[int, ...]:
    """Of a convolution PEFT has one gain for each channel."""
    size, window = m.inputs[0] if feedforward else m.outputs, m.inputs[1:]
    if window:
        return (1, size, *(1,) * len(window))
    return (1, size) if feedforward else (size, 1)


def _read(m: TorchModule, tensors: Any) -> FromPeft:
    gain, feedforward = tensors["ia3_l"].reshape(-1), _feedforward(m)
    if feedforward:
        return FromPeft({"feedforward": True}, {"gain": gain.repeat(m.size // len(gain))})
    return FromPeft({"feedforward": False}, {"gain": gain}, bias_gain=gain)


def _write(m: TorchModule, setting: Any, leaves: Any) -> dict[str, Any]:
    gain = leaves["gain"]
    if setting.feedforward:
        by_channel = gain.reshape(m.inputs[0], -1)
        if not (by_channel == by_channel[:, :1]).all():
            raise AdapterError(f"PEFT has one gain for each channel of {m.name!r}; here they vary over the window.")
        gain = by_channel[:, 0]
    return {"ia3_l": gain.reshape(_shape(m, setting.feedforward))}


def _share(modules: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Names the modules whose gains are over inputs."""
    chosen = sorted(name for name, (_, setting, *_) in modules.items() if setting.feedforward)
    if any(other.endswith(name) for name in chosen for other in set(modules) - set(chosen)):
        return {}, {"feedforward_modules": f"({'|'.join(map(re.escape, chosen))})"}
    return {}, {"feedforward_modules": chosen}


IA3_METHOD = Method(
    setting=IA3,
    leaves=IA3Leaves,
    init=init,
    update=update,
    gains=frozenset({"gain"}),
    peft=PeftForm(
        peft_type="IA3",
        axes=lambda setting: {"gain": "i" if setting.feedforward else "o"},
        layers=frozenset({"Linear", "Conv1D", "Conv2d", "Conv3d"}),
        keys={"feedforward_modules": None},
        training=frozenset({"init_ia3_weights"}),
        bias_gain=lambda m, setting, leaves: None if setting.feedforward else leaves["gain"],
        endings=("ia3_l",),
        shapes=lambda m, tensors: {"ia3_l": _shape(m, _feedforward(m))},
        read=_read,
        write=_write,
        config=lambda m, setting, leaves: {},
        share=_share,
    ),
)
