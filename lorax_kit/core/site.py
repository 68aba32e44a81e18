"""What is planned for one parameter: which of its axes are inputs, outputs and stacked, and its setting."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

from lorax_kit.core.specs.setting import Setting

USES = ("product", "lookup", "tied", "other")
"""What a function may do with a site: `Site.use`."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Which axes of a parameter are contracted with its input, which make its output, which are stacked.

    `stack` axes (scanned layers, experts) hold independent matrices: both factors carry them.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stack: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Site:
    """One adapted parameter.

    Attributes:
      path: name of the leaf in the params.
      shape, dtype: of the parameter.
      axes: how the function contracts it.
      use: what the function does: "product", "lookup" (an embedding, so `b` is drawn and `a` starts at zero), "tied" (a
        lookup, and a product elsewhere), "other" (a convolution; or what is materialised, whose last axis is then taken
        for the output).
      setting: the method and its settings, from the rule that matched.

    What a method's `init` and `update` read of it besides: `rank`, `scale`, `in_shape`, `out_shape`, `stack_shape`,
    `a_shape` (rank, *stack, *in), `b_shape` (rank, *stack, *out), `lookup`, and `matrices` and `from_matrices`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: Axes
    use: str
    setting: Setting

    def _sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in axes)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Sizes of the contracted axes."""
        return self._sizes(self.axes.inputs)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Sizes of the output axes."""
        return self._sizes(self.axes.outputs)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Sizes of the stacked axes."""
        return self._sizes(self.axes.stack)

    @property
    def a_shape(self) -> tuple[int, ...]:
        """Shape of `rank` rows over the inputs: (rank, *stack, *in)."""
        return (self.rank, *self.stack_shape, *self.in_shape)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """Shape of `rank` rows over the outputs: (rank, *stack, *out)."""
        return (self.rank, *self.stack_shape, *self.out_shape)

    @property
    def rank(self) -> int:
        """Of the setting; 0 for a method without one."""
        return int(getattr(self.setting, "rank", 0))

    @property
    def dropout(self) -> float:
        """Of the setting; 0 for a method without one."""
        return float(getattr(self.setting, "dropout", 0.0))

    @property
    def lookup(self) -> bool:
        """Whether rows are looked up."""
        return self.use in ("lookup", "tied")

    @property
    def scale(self) -> float:
        """s in W + s * sum_r a[r] b[r]."""
        return self.setting.scale

    @property
    def max_rank(self) -> int:
        """min(in, out): the rank above which factors hold nothing new."""
        return min(prod(self.in_shape), prod(self.out_shape))

    def matrices(self, x: Any) -> Any:
        """An array of the parameter's shape, of jax or numpy, as (S, K, N): stacked matrices of inputs and outputs."""
        x = x.transpose((*self.axes.stack, *self.axes.inputs, *self.axes.outputs))
        return x.reshape(prod(self.stack_shape), prod(self.in_shape), prod(self.out_shape))

    def from_matrices(self, x: Any) -> Any:
        """(S, K, N) in the parameter's shape: the inverse of `matrices`."""
        order = (*self.axes.stack, *self.axes.inputs, *self.axes.outputs)
        x = x.reshape(*self.stack_shape, *self.in_shape, *self.out_shape)
        return x.transpose([order.index(i) for i in range(len(order))])

    def unnamed(self) -> Site:
        """The same site without its path: sites alike have leaves alike."""
        return replace(self, path="")


@dataclass(frozen=True, kw_only=True)
class FullSite:
    """One parameter that an adapter has whole: trained in full, or given anew by the model's training pass."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool = True
