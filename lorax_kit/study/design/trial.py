"""One point of a study, and the axes whose values make it: what each may hold, and how it stands in a trial's name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lorax_kit.core.quantised import METHODS as QUANTISERS
from lorax_kit.core.specs.setting import is_int, is_number, plain, shown
from lorax_kit.errors import StudyError

PROBE = "probe"
FLOAT32_MAX = 3.4e38
DTYPES = ("float32", "bfloat16", "float16")


class Axis(NamedTuple):
    """What the values of an axis may be.

    Attributes:
      ok: whether a value may stand.
      words: what it must be, for errors.
      default: the value of a study that does not say; trials' names leave it out.
      tag: what precedes another value in a trial's name.
    """

    ok: Callable[[Any], bool]
    words: str
    default: Any = None
    tag: str = ""


def positive(x: Any) -> bool:
    """Whether `x` is a positive number of float32's range."""
    return is_number(x) and 0 < x < FLOAT32_MAX


def _text(x: Any) -> bool:
    return isinstance(x, str) and x != ""


AXES: dict[str, Axis] = {
    "variant": Axis(_text, "the name of a method", "lora"),
    "targets": Axis(_text, "the name of one of the study's targets"),
    "rank": Axis(lambda x: is_int(x) and x >= 1, "an integer of at least 1"),
    "alpha": Axis(lambda x: x is None or positive(x), "a positive number of float32's range, or None"),
    "start": Axis(_text, "the name of a start", "kaiming", "start-"),
    "dropout": Axis(lambda x: is_number(x) and 0 <= x < 1, "a number in [0, 1)", 0.0, "do"),
    "optimizer": Axis(_text, "the name of an optimiser", "adamw", "opt-"),
    "weight_decay": Axis(lambda x: is_number(x) and 0 <= x < FLOAT32_MAX, "a number of at least 0", 0.0, "wd"),
    "lr_ratio": Axis(positive, "a positive number of float32's range", 1.0, "ratio"),
    "dtype": Axis(lambda x: x is None or x in DTYPES, f"None, {', '.join(DTYPES)}", None, ""),
    "quantise": Axis(lambda x: x is None or x in QUANTISERS, f"None, {', '.join(QUANTISERS)}", None, ""),
    "batch_size": Axis(lambda x: x is None or (is_int(x) and x >= 1), "an integer of at least 1, or None", None, "b"),
    "accumulate": Axis(lambda x: is_int(x) and x >= 1, "an integer of at least 1", 1, "acc"),
    "lr": Axis(positive, "a positive number of float32's range"),
    "seed": Axis(lambda x: is_int(x) and 0 <= x < 2**31, "an integer in [0, 2^31)"),
}
"""The axes of a study, in the order of its trials: the last varies fastest."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of a study. Rank 0 is the probe on the frozen base: only what is trained in full learns.

    Attributes:
      hyper: (name, value) of the scalars that the optimiser or the loss reads, by name.
      settings: (name, JSON text) of further settings of its method, by name.
      The others are the axes of `lk.Study`.
    """

    rank: int
    alpha: float
    lr: float
    seed: int
    targets: str
    variant: str = "lora"
    start: str = "kaiming"
    dropout: float = 0.0
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    lr_ratio: float = 1.0
    dtype: str | None = None
    quantise: str | None = None
    batch_size: int | None = None
    accumulate: int = 1
    hyper: tuple[tuple[str, float], ...] = ()
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """A file name that says every setting: unique, whatever study the trial is part of."""
        more = [_tagged(axis.tag, getattr(self, name)) for name, axis in AXES.items() if self._differs(name, axis)]
        more += [_tagged(f"{name}-", value) for name, value in self.hyper]
        more += [_tagged(f"{name}-", json.loads(value)) for name, value in self.settings]
        rest = "".join(f"_{part}" for part in more)
        if self.rank == 0:
            return f"{PROBE}_lr{number(self.lr)}{rest}_s{self.seed}"
        variant = "" if self.variant == "lora" else f"{self.variant}_"
        scale = f"a{number(self.alpha)}_lr{number(self.lr)}"
        return f"{variant}r{self.rank}_{scale}_{self.targets}{rest}_s{self.seed}"

    def _differs(self, name: str, axis: Axis) -> bool:
        named = name in ("variant", "targets", "rank", "alpha", "lr", "seed")
        return not named and getattr(self, name) != axis.default

    def columns(self) -> dict[str, Any]:
        """The settings as columns of a row; scalars of the optimiser or the loss as `hyper_<name>`."""
        own = {name: getattr(self, name) for name in AXES}
        return (
            own
            | {f"hyper_{name}": value for name, value in self.hyper}
            | ({"settings": {name: json.loads(value) for name, value in self.settings}} if self.settings else {})
        )


def number(x: float) -> str:
    """A number as short as it can be told from others."""
    short = f"{x:g}"
    return short if float(short) == x else repr(x)


def _tagged(tag: str, value: Any) -> str:
    text = number(value) if is_number(value) else str(value).lower() if isinstance(value, bool) else str(value)
    return tag + "".join(c if c.isalnum() or c in ".-+" else "-" for c in text)


def values_of(name: str, given: Any) -> tuple:
    """The values of an axis, one or several.

    Raises:
      StudyError: none, a repeated one, or one that cannot stand.
    """
    several = isinstance(given, Iterable) and not isinstance(given, str | Mapping)
    values = tuple(plain(x) for x in (given if several else [given]))
    if not values:
        raise StudyError(f"study {name} is empty; give at least one value.")
    axis = AXES[name]
    for x in values:
        if not axis.ok(x):
            hint = "\n  for the frozen probe give probe_lr" if name == "rank" and x == 0 else ""
            raise StudyError(f"study {name} holds {shown(x)}; it must be {axis.words}.{hint}")
    if len(set(values)) < len(values):
        raise StudyError(f"study {name} repeats a value: {shown(list(values))}.")
    return values


def targets_of(given: Any) -> dict[str, tuple[str, ...]]:
    """Name -> patterns, of a study's `targets`.

    Raises:
      StudyError: no mapping, no patterns, a name that no file can have.
    """
    check(isinstance(given, Mapping) and len(given) > 0, "study targets must map names to patterns.")
    for name, patterns in given.items():
        listed = isinstance(patterns, Sequence) and not isinstance(patterns, str) and len(patterns) > 0
        check(
            listed and all(isinstance(pattern, str) for pattern in patterns),
            f"study targets {shown(name)} must be a list of patterns.",
        )
        ok = isinstance(name, str) and name.replace("-", "").replace("_", "").isalnum()
        check(ok, f"study targets name {shown(name)} goes into file names: use letters, digits, '-' and '_'.")
    return {name: tuple(patterns) for name, patterns in given.items()}


def hyper_of(given: Any) -> dict[str, tuple[float, ...]]:
    """Name -> values, of a study's `hyper`.

    Raises:
      StudyError: no mapping, a name that is an axis or no keyword, values that are no numbers.
    """
    check(isinstance(given, Mapping), f"study hyper is {shown(given)}; it must map names to values.")
    out = {}
    for name, values in given.items():
        check(isinstance(name, str) and name.isidentifier(), f"study hyper {shown(name)} is no name of a keyword.")
        axis = name in AXES or name == "learning_rate"
        check(not axis, f"study hyper holds {name!r}, which is an axis of the study: give it there.")
        several = isinstance(values, Sequence)
        numbers = tuple(plain(x) for x in (values if several else [values]))
        ok = len(numbers) > 0 and all(is_number(x) and abs(x) < FLOAT32_MAX for x in numbers)
        check(ok, f"study hyper {name!r} holds {shown(values)}; it must be a number or several.")
        check(len(set(numbers)) == len(numbers), f"study hyper {name!r} repeats a value: {shown(list(numbers))}.")
        out[name] = numbers
    return out


def check(ok: bool, message: str) -> None:
    """Raise `StudyError` unless `ok`."""
    if not ok:
        raise StudyError(message)
