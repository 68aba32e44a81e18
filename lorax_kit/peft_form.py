"""How PEFT keeps a method: data and small functions on numpy arrays, which each method brings.

`lorax_kit.peft` reads and writes folders by them and names no method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple


class TorchModule(NamedTuple):
    """A module that PEFT adapts, as the forms see it.

    Attributes:
      name: in the torch model.
      layer: what PEFT would put around it: "Linear", "Conv1D" (transformers' Linear whose weight is (in, out)),
        "Embedding", "Conv1d", "Conv2d", "Conv3d", or "Parameter".
      outputs: N.
      inputs: (K,), or (channels, *window) of a convolution.
      config: the keys of the form, patterns looked up for this module.
      weight: () -> W (K, N) in float64, inputs in torch's order.
      shared: tensors of the whole adapter (VeRA's draws).
      dtype: of the parameter here.
    """

    name: str
    layer: str
    outputs: int
    inputs: tuple[int, ...]
    config: Mapping[str, Any]
    weight: Callable[[], Any]
    shared: Mapping[str, Any]
    dtype: str = "float32"

    @property
    def size(self) -> int:
        """K, all inputs."""
        return prod(self.inputs)


class FromPeft(NamedTuple):
    """What a form reads of one module.

    Attributes:
      setting: keywords of the method's setting, without its dtype.
      leaves: name -> array, axes as the form's `axes` say.
      bias_gain, bias_shift: what PEFT also does to the module's bias: gain * bias + shift, (N,); None: nothing.
    """

    setting: dict[str, Any]
    leaves: dict[str, Any]
    bias_gain: Any = None
    bias_shift: Any = None


@dataclass(frozen=True, kw_only=True)
class PeftForm:
    """How PEFT keeps a method: data and small functions on numpy arrays; `lorax_kit.peft` does the rest.

    Attributes:
      peft_type: as in adapter_config.json.
      when: what the config says where two methods share a type (LoRA and DoRA).
      beside: peft_type of other methods -> what it may stand beside in one folder, as (end of its tensors' names, key
        of the config that names its modules).
      axes: leaf -> its axes in the functions below: "r" the rank, "i" all inputs K, "o" all outputs N, each flat and in
        torch's order; "" as it is in the leaves; in capitals, without the stack. Or a function of the setting.
      layers: kinds of modules that PEFT can adapt by it; see `TorchModule`.
      keys: key of the config -> its default in PEFT: what `read` asks for.
      patterns: key -> the key of its values by module.
      training: keys that change the training alone, or where it starts.
      refused: key -> why a value other than nothing cannot be read.
      bias: the value of `bias` that trains the adapted modules' own biases; None: PEFT has none.
      ties: whether PEFT moves a tied head with its embedding: "always", "asked" (ensure_weight_tying), or "never".
      bias_gain: (module, setting, leaves) -> what PEFT also multiplies the module's bias by, (N,) or None.
      shapes: (module, tensors) -> end of a name -> the shape that its tensor has; all that must stand at a module.
      read: (module, tensors) -> `FromPeft`.
      write: (module, setting, leaves) -> tensors by the ends of their names.
      config: (module, setting, leaves) -> keys of the config; those in `patterns` may differ by module.
      endings: ends of the names of all its tensors.
      older: an end that is also read -> the one it stands for.
      product: the update is that of a and b through their product alone, an output each: factors of a rank that is too
        high can be reduced, fused outputs be split, and zero rows be added.
      apart, together: tensors of a parameter (experts, *matrix) to those of each, and back.
      shared: (config, modules, tensors) -> tensors of the whole adapter, their shapes checked; None: there are none.
      share: ({name: (module, setting, leaves, tensors)}) -> tensors of the whole adapter, and keys of the config.
    """

    peft_type: str
    axes: Mapping[str, str] | Callable[[Any], Mapping[str, str]]
    layers: frozenset[str]
    shapes: Callable[[TorchModule, Mapping[str, Any]], dict[str, tuple[int, ...]]]
    read: Callable[[TorchModule, Mapping[str, Any]], FromPeft]
    write: Callable[[TorchModule, Any, dict[str, Any]], dict[str, Any]]
    config: Callable[[TorchModule, Any, dict[str, Any]], dict[str, Any]]
    endings: tuple[str, ...]
    older: Mapping[str, str] = field(default_factory=dict)
    product: bool = False
    apart: Callable[[Mapping[str, Any], int], list[dict[str, Any]]] | None = None
    together: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None
    when: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=dict)
    training: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    bias: str | None = None
    ties: str = "never"
    bias_gain: Callable[[TorchModule, Any, Mapping[str, Any]], Any] | None = None
    shared: Callable[[Mapping[str, Any], list[TorchModule], Mapping[str, Any]], dict[str, Any]] | None = None
    share: Callable[[dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]] | None = None

    def axes_of(self, setting: Any) -> Mapping[str, str]:
        """Leaf -> its axes."""
        return self.axes(setting) if callable(self.axes) else self.axes
