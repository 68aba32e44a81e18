"""Designs drawn from ranges in place of all combinations: random, or Sobol's sequence, which fills space evenly."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from lorax_kit.core.specs.setting import is_int, is_number, plain, shown
from lorax_kit.errors import StudyError
from lorax_kit.study.design.trial import AXES, FLOAT32_MAX

KINDS = ("random", "sobol")
WHOLE = ("rank", "batch_size", "accumulate")
"""Axes of whole numbers."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw the settings of a study's conditions instead of listing them; each is trained with every seed.

    Args:
      conditions: how many to draw. Sobol's sequence is balanced at powers of two.
      ranges: axis -> a list of values to choose from, or {"low": x, "high": y} of numbers, with "log": true for a
        uniform logarithm. Scalars of the optimiser or loss are named "hyper.NAME". Numbers are drawn to four digits.
      kind: "sobol" (scrambled) or "random".
      seed: of the draw.

    Raises:
      StudyError: an unknown axis, an empty range, a range of what is not a number.

    Example:
      >>> sample = Sample(conditions=4, ranges={"lr": {"low": 1e-4, "high": 1e-1, "log": True}, "rank": [1, 4]})
      >>> len(sample.points()), sorted(sample.points()[0])
      (4, ['lr', 'rank'])
    """

    conditions: int
    ranges: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "sobol"
    seed: int = 0

    def __post_init__(self) -> None:
        def check(ok: bool, message: str) -> None:
            if not ok:
                raise StudyError(message)

        check(self.kind in KINDS, f"sample kind is {shown(self.kind)}; choose from {', '.join(KINDS)}.")
        ok = is_int(self.conditions) and self.conditions >= 1
        check(ok, f"sample conditions is {shown(self.conditions)}; it must be an integer of at least 1.")
        check(is_int(self.seed) and self.seed >= 0, f"sample seed is {shown(self.seed)}; it must be at least 0.")
        check(isinstance(self.ranges, Mapping) and len(self.ranges) > 0, "sample ranges must map axes to ranges.")
        for name, given in self.ranges.items():
            known = name in AXES or (isinstance(name, str) and name.startswith("hyper."))
            check(known and name != "seed", f"sample ranges hold {shown(name)}, which is no axis to draw from.")
            if isinstance(given, Mapping):
                self._check_interval(name, given)
                continue
            listed = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
            check(listed, f"sample range {name!r} is {shown(given)}; it must be a list, or an object of low and high.")
            for x in given:
                ok = AXES[name].ok(plain(x)) if name in AXES else is_number(x)
                check(ok, f"sample range {name!r} holds {shown(x)}, which the axis cannot be.")
        object.__setattr__(self, "ranges", {name: plain(x) for name, x in self.ranges.items()})

    def _check_interval(self, name: str, given: Mapping[str, Any]) -> None:
        low, high, log = given.get("low"), given.get("high"), given.get("log", False)
        ok = set(given) <= {"low", "high", "log"} and is_number(low) and is_number(high) and isinstance(log, bool)
        ok = ok and low < high < FLOAT32_MAX and (low > 0 or not log)  # type: ignore[operator]
        if not ok:
            raise StudyError(
                f"sample range {name!r} is {shown(dict(given))}; it must be low < high, and with log 0 < low."
            )
        whole = name not in WHOLE or (is_int(low) and is_int(high))
        if name in AXES and not (
            whole and AXES[name].ok(low) and AXES[name].ok(high) and is_number(AXES[name].default or 1.0)
        ):
            raise StudyError(f"sample range {name!r} is an interval; of that axis give a list of values.")

    def points(self) -> tuple[dict[str, Any], ...]:
        """The drawn settings, axis -> value: `conditions` of them, equal ones once."""
        unit = _sobol(len(self.ranges), self.conditions, self.seed) if self.kind == "sobol" else None
        if unit is None:
            unit = np.random.default_rng(self.seed).random((self.conditions, len(self.ranges)))
        distinct = {}
        for row in unit:
            point = {
                name: _at(name, given, float(u)) for (name, given), u in zip(self.ranges.items(), row, strict=True)
            }
            distinct[repr(point)] = point
        return tuple(distinct.values())

    @classmethod
    def from_dict(cls, data: Any) -> Sample:
        """From JSON data; unknown keys raise `StudyError`."""
        known = [f.name for f in fields(cls)]
        if not isinstance(data, Mapping) or set(data) - set(known) or "conditions" not in data:
            raise StudyError(
                f"study sample is {shown(data)}; it must be an object with conditions, ranges, kind, seed."
            )
        return cls(**data)


def _sobol(dimensions: int, count: int, seed: int) -> np.ndarray:
    from scipy.stats import qmc

    with warnings.catch_warnings():  # that other numbers than powers of two lose the balance, `Sample` says
        warnings.simplefilter("ignore", UserWarning)
        return qmc.Sobol(dimensions, rng=np.random.default_rng(seed)).random(count)  # type: ignore[no-any-return]


def _at(name: str, given: Any, u: float) -> Any:
    """The value of a range at `u` in [0, 1)."""
    if not isinstance(given, Mapping):
        return given[min(int(u * len(given)), len(given) - 1)]
    low, high = given["low"], given["high"]
    if name in WHOLE:
        if given.get("log"):
            return min(max(round(low * (high / low) ** u), low), high)
        return low + min(int(u * (high - low + 1)), high - low)
    if given.get("log"):
        return float(f"{math.exp(math.log(low) + u * (math.log(high) - math.log(low))):.4g}")
    return float(f"{low + u * (high - low):.4g}")
