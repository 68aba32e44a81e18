"""Settings: what a rule of a spec says of the parameters it matches. Each file of `lorax_kit.methods` adds a class.

A setting is a frozen dataclass of plain values, so that it hashes, compares, and turns into JSON and back.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np

from lorax_kit.errors import SpecError

FLOATS = ("bfloat16", "float16", "float32", "float64")
LARGEST = sys.float_info.max
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def need(ok: bool, message: str) -> None:
    """Raise `SpecError` unless `ok`."""
    if not ok:
        raise SpecError(message)


def is_int(x: Any) -> bool:
    """Whether `x` is an integer of 32 bits, which a bool is not."""
    return isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**31


def is_number(x: Any) -> bool:
    """Whether `x` is a finite number that a float holds, which a bool is not."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= LARGEST


def is_float32(x: Any) -> bool:
    """Whether `x` is a number that float32 holds without turning into an infinity, or another than 0 into 0."""
    if not is_number(x) or not abs(x) <= LARGEST_FLOAT32:
        return False
    return x == 0 or bool(np.float32(x) != 0)


def shown(x: Any) -> str:
    """A value within a line of a message."""
    try:
        text = repr(x)
    except (ValueError, RecursionError):  # Python writes no integers of thousands of digits
        text = f"a {type(x).__name__} too large to write"
    return text if len(text) <= 100 else f"{text[:50]}... ({len(text):,} characters)"


def plain(x: Any) -> Any:
    """A numpy scalar as Python's own number, so that settings compare, hash and turn into JSON alike."""
    return x.item() if isinstance(x, np.generic) else x


def check_float_dtype(name: Any, where: str) -> None:
    """Raise `SpecError` unless `name` names a float dtype."""
    try:
        ok = isinstance(name, str) and str(jnp.dtype(name)) in FLOATS
    except (TypeError, ValueError, SyntaxError):  # numpy also reads lists of dtypes
        ok = False
    need(ok, f"{where} is {shown(name)}; it must name a float dtype such as 'float32' or 'bfloat16'.")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the settings of every method have.

    Args:
      dtype: dtype in which the leaves are stored and trained. What gains are made of stays in at least float32.
      inputs: which axes of the parameter are its inputs; None: those that the function contracts. To be given only
        where the function uses the parameter in ways that do not agree, or where no function is traced.
    """

    dtype: str = "float32"
    inputs: tuple[int, ...] | None = None
    kind: ClassVar[str] = ""
    older: ClassVar[tuple[str, ...]] = ()
    """Keys of older JSON that the constructor still takes."""

    def __post_init__(self, *_: Any) -> None:
        check_float_dtype(self.dtype, "dtype")
        if self.inputs is not None:
            axes = self.inputs if isinstance(self.inputs, list | tuple) else (None,)
            ok = bool(axes) and all(is_int(i) and i >= 0 for i in axes) and len(set(axes)) == len(axes)
            need(ok, f"inputs is {shown(self.inputs)}; it must list axes of the parameter, such as (0,).")
            object.__setattr__(self, "inputs", tuple(sorted(axes)))

    @property
    def scale(self) -> float:
        """s in W + s * sum_r a[r] b[r]."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class RankSetting(Setting):
    """What the settings of a method with a rank have.

    Args:
      rank: at least 1, and at most what the method can hold at every site: min(in, out) for most.
      dropout: probability in [0, 1) of dropping inputs of the low-rank path while training.
    """

    rank: int
    dropout: float = 0.0

    def __post_init__(self, *_: Any) -> None:
        for name in ("rank", "dropout"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        super().__post_init__()
        need(
            is_int(self.rank) and self.rank >= 1,
            f"rank is {shown(self.rank)}; it must be an integer of at least 1.\n"
            "  to train no low-rank factors at all, leave the rule out",
        )
        ok = is_number(self.dropout) and 0 <= self.dropout < 1
        need(ok, f"dropout is {shown(self.dropout)}; it must lie in [0, 1).")

    def of_rank(self, rank: int) -> Self:
        """The setting at another rank, of the same scale where it has an alpha."""
        return replace(self, rank=rank)


@dataclass(frozen=True, kw_only=True)
class AlphaSetting(RankSetting):
    """What the settings of a method with a rank and an alpha have.

    Args:
      alpha: numerator of the scale; None means alpha = rank.
    """

    alpha: float | None = None

    def __post_init__(self, *_: Any) -> None:
        object.__setattr__(self, "alpha", plain(self.alpha))
        super().__post_init__()
        ok = self.alpha is None or (is_float32(self.alpha) and self.alpha > 0)
        need(ok, f"alpha is {shown(self.alpha)}; it must be a positive number of float32's range.")
        ok = is_float32(self.scale)  # a rank can take a small alpha below the range
        need(ok, f"alpha {shown(self.alpha)} at rank {self.rank} is a scale of {self.scale:g}, below float32's range.")

    @property
    def effective_alpha(self) -> float:
        """Alpha, or the rank where none was given."""
        return self.rank if self.alpha is None else self.alpha

    def of_rank(self, rank: int) -> Self:
        """The setting at another rank, of the same scale."""
        other = replace(self, rank=rank)
        if other.scale == self.scale:
            return other
        return replace(other, alpha=other.effective_alpha * self.scale / other.scale)


@dataclass(frozen=True, kw_only=True)
class ScaledSetting(AlphaSetting):
    """What the settings of the methods that scale as LoRA does have.

    Args:
      alpha: the scale is alpha / rank (or alpha / sqrt(rank)); None means alpha = rank, a scale of 1.
      rslora: scale by alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732).
    """

    rslora: bool = False

    def __post_init__(self, *_: Any) -> None:
        need(isinstance(self.rslora, bool), f"rslora is {shown(self.rslora)}; it must be true or false.")
        super().__post_init__()

    @property
    def scale(self) -> float:
        """s in W + s * sum_r a[r] b[r]."""
        return float(self.effective_alpha / (self.rank**0.5 if self.rslora else self.rank))


@dataclass(frozen=True, kw_only=True)
class Full:
    """Train a parameter in full: a head, biases, norms.

    Args:
      dtype: in which it is trained, at least as wide as its own; None: its own, or float32 where that is narrower.
      trained: False for what an adapter has for itself and no optimiser moves: the running statistics of BatchNorm,
        which the model's own training pass gives anew.
    """

    dtype: str | None = None
    trained: bool = True
    kind: ClassVar[str] = "full"
    older: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.dtype is not None:
            check_float_dtype(self.dtype, "dtype")
        need(isinstance(self.trained, bool), f"trained is {shown(self.trained)}; it must be true or false.")
