"""Early stopping: which trials go on at each rung, by their validations so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from statistics import fmean, median
from typing import Any, ClassVar

from lorax_kit.core.specs.setting import is_int, is_number, shown
from lorax_kit.errors import StudyError
from lorax_kit.study.design.trial import AXES, Trial

BY = ("condition", "trial")


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """What the rules share.

    Args:
      first: steps before the first decision.
      by: "condition": all seeds of a condition go on or stop together, by their mean, so that pairs stay pairs;
        "trial": each by itself.
      within: axes, such as ("variant", "rank"): trials compete only with those of the same values.
    """

    first: int
    by: str = "condition"
    within: Sequence[str] = ()
    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        ok = is_int(self.first) and self.first >= 1
        _check(ok, f"{self.kind} first is {shown(self.first)}; it must be an integer of at least 1.")
        _check(self.by in BY, f"{self.kind} by is {shown(self.by)}; choose from {', '.join(BY)}.")
        listed = isinstance(self.within, Sequence) and not isinstance(self.within, str)
        _check(listed, f"{self.kind} within is {shown(self.within)}; it must be a list of axes.")
        for name in self.within:
            _check(name in AXES and name != "seed", f"{self.kind} within holds {shown(name)}, which is no axis.")
        object.__setattr__(self, "within", tuple(self.within))

    def rungs(self, steps: int) -> tuple[int, ...]:
        """The steps after which trials are compared, ascending, and the last step."""
        raise NotImplementedError

    def chosen(self, histories: Mapping[Any, list[float]]) -> set[Any]:
        """Which competitors go on; of each the metric at every rung so far, better when higher."""
        raise NotImplementedError

    def survivors(self, trials: Sequence[Trial], histories: Mapping[str, list[float]]) -> set[str]:
        """Names of the trials that go on.

        Args:
          trials: those that reached the rung.
          histories: name -> the metric at every rung so far, better when higher; NaN is the worst.
        """
        rooms: dict[Any, dict[Any, list[Trial]]] = {}
        for trial in trials:
            room = tuple(getattr(trial, name) for name in self.within)
            unit = replace(trial, seed=0) if self.by == "condition" else trial
            rooms.setdefault(room, {}).setdefault(unit, []).append(trial)
        out: set[str] = set()
        for units in rooms.values():
            means = {
                unit: [
                    fmean(-math.inf if math.isnan(x) else x for x in at)
                    for at in zip(*(histories[trial.name] for trial in members), strict=True)
                ]
                for unit, members in units.items()
            }
            out |= {trial.name for unit in self.chosen(means) for trial in units[unit]}
        return out

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"kind": self.kind, **asdict(self), "within": list(self.within)}


@dataclass(frozen=True, kw_only=True)
class Halving(Stopping):
    """Successive halving: the best share of each rung goes on to 1 / share times its steps (Jamieson & Talwalkar 2016).

    All trials of a rung are trained before any goes on, so nothing depends on which was first; freed places in the
    stacked program are filled with trials that go on from other groups.

    Args:
      keep: the share that goes on at each rung, at least one.
      first, by, within: as in `Stopping`.

    Example:
      >>> Halving(first=10).rungs(100)
      (10, 30, 90, 100)
    """

    keep: float = 1 / 3
    kind: ClassVar[str] = "halving"

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = is_number(self.keep) and 0 < self.keep < 1
        _check(ok, f"halving keep is {shown(self.keep)}; it must lie between 0 and 1.")

    def rungs(self, steps: int) -> tuple[int, ...]:
        """`first` times powers of 1 / keep, and the last step."""
        out, rung = [], float(self.first)
        while round(rung) < steps:
            out.append(round(rung))
            rung = max(rung / self.keep, rung + 1)
        return (*out, steps)

    def chosen(self, histories: Mapping[Any, list[float]]) -> set[Any]:
        """The best at this rung; of equals the first."""
        count = max(1, math.ceil(self.keep * len(histories) - 1e-9))
        return set(sorted(histories, key=lambda unit: -histories[unit][-1])[:count])


@dataclass(frozen=True, kw_only=True)
class MedianRule(Stopping):
    """Stop what has never been as good as the median's running average (Golovin et al. 2017, "Vizier").

    Args:
      every: steps between decisions after the first.
      first, by, within: as in `Stopping`.
    """

    every: int
    kind: ClassVar[str] = "median"

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = is_int(self.every) and self.every >= 1
        _check(ok, f"median every is {shown(self.every)}; it must be an integer of at least 1.")

    def rungs(self, steps: int) -> tuple[int, ...]:
        """`first`, then every so many steps, and the last."""
        return (*range(self.first, steps, self.every), steps)

    def chosen(self, histories: Mapping[Any, list[float]]) -> set[Any]:
        """Those whose best value so far reaches the median of all running averages."""
        middle = median(fmean(values) for values in histories.values())
        passing = {unit for unit, values in histories.items() if max(values) >= middle}
        return passing or set(histories)


RULES: dict[str, type[Stopping]] = {rule.kind: rule for rule in (Halving, MedianRule)}


def stopping_from(data: Any) -> Stopping:
    """A rule from JSON data: an object with "kind" and the rule's arguments.

    Raises:
      StudyError: an unknown kind or key.
    """
    if isinstance(data, Stopping):
        return data
    _check(isinstance(data, Mapping), f"study stop is {shown(data)}; it must be lk.Halving(...) or an object.")
    kind = data.get("kind")
    _check(kind in RULES, f"study stop has the kind {shown(kind)}; choose from {', '.join(RULES)}.")
    rule = RULES[kind]
    given = {key: x for key, x in data.items() if key != "kind"}
    known = [f.name for f in fields(rule)]
    unknown = sorted(set(given) - set(known))
    _check(not unknown, f"study stop has the unknown key {', '.join(map(repr, unknown))}; known: {', '.join(known)}.")
    missing = sorted({"first", *({"every"} if kind == "median" else ())} - set(given))
    _check(not missing, f"study stop lacks {', '.join(map(repr, missing))}.")
    return rule(**given)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise StudyError(message)
