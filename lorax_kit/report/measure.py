"""How the metric of a run is named, shown and compared: what `study.json` says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorax_kit.analysis.statistics.conditions import Comparison, Interval


@dataclass(frozen=True)
class Measure:
    """A metric of a run.

    Attributes:
      name: of the metric; its columns are `val_<name>` and `test_<name>`.
      better: "higher" or "lower".
      format: Python's format specification; one that ends in "%" is of a share.
    """

    name: str = "accuracy"
    better: str = "higher"
    format: str = ".1%"

    @classmethod
    def of(cls, study: Mapping[str, Any]) -> Measure:
        """The metric that a run chose by; accuracy for runs from before there were others."""
        name = study.get("metric", "accuracy")
        return next((one for one in measures(study) if one.name == name), cls(name=str(name)))

    @property
    def sign(self) -> int:
        """1 if higher is better, else -1."""
        return 1 if self.better == "higher" else -1

    @property
    def share(self) -> bool:
        """Whether values are shares, shown as percent."""
        return self.format.endswith("%")

    @property
    def factor(self) -> float:
        """What values are multiplied by when they are drawn."""
        return 100.0 if self.share else 1.0

    @property
    def counted(self) -> bool:
        """Whether it is a share counted over examples, whose error follows from the share alone: accuracy is."""
        return self.name == "accuracy"

    def margin(self, study: Mapping[str, Any]) -> float | None:
        """How much worse may be called no worse: what a run says, else a percentage point of a share, else None."""
        said = study.get("margin", (study.get("design") or {}).get("margin"))
        if isinstance(said, int | float) and not isinstance(said, bool):
            return float(said)
        return 0.01 if self.share else None

    @property
    def word(self) -> str:
        """The name in a sentence."""
        return self.name.replace("_", " ")

    @property
    def unit(self) -> str:
        """ " (%)" behind the label of an axis, or nothing."""
        return " (%)" if self.share else ""

    @property
    def highest(self) -> str:
        """ "highest" or "lowest": what the best one is."""
        return "highest" if self.better == "higher" else "lowest"

    def short(self, value: float) -> str:
        """0.8731 -> "87.3", without its unit."""
        if math.isnan(value):
            return "–"
        return format(value, self.format).removesuffix("%").replace("-", "−")

    def text(self, value: float) -> str:
        """0.8731 -> "87.3 %"; nan -> a dash."""
        return self.short(value) + (" %" if self.share and not math.isnan(value) else "")

    def cell(self, value: float) -> str:
        """With one digit more, for a table of single trials."""
        return f"{100 * value:.2f}" if self.share else format(value, self.format)

    def interval(self, value: Interval, *, short: bool = False) -> str:
        """ "87.3 % (95 % interval 86.9 to 87.8, Student t, n = 6)", or "87.3 [86.9, 87.8]" when short."""
        if math.isnan(value.mean):
            return "–"
        bounds = not math.isnan(value.low)
        if self.share:  # intervals of means do not know that shares end
            value = value._replace(low=max(value.low, 0.0), high=min(value.high, 1.0))
        low, high = self.short(value.low), self.short(value.high)
        if short:
            return self.short(value.mean) + (f" [{low}, {high}]" if bounds else "")
        return self.text(value.mean) + (f" (95 % interval {low} to {high}, {value.method})" if bounds else "")

    def signed(self, difference: float) -> str:
        """A difference with its sign: "+0.31" percentage points of a share, three digits of anything else."""
        text = f"{100 * difference:+.2f}" if self.share else f"{difference:+.3g}"
        return "0.00" if float(text) == 0 else text.replace("-", "−")

    def amount(self, difference: float) -> str:
        """The size of a difference: "1.00 points" of a share, three digits of anything else."""
        return self.signed(abs(difference)).removeprefix("+") + (" points" if self.share else "")

    def difference(self, found: Comparison) -> str:
        """Best - condition with its interval, in percentage points where the metric is a share."""
        text = self.signed(-found.difference) + (" points" if self.share else "")
        if not math.isnan(found.low):
            text += f" (95 % interval {self.signed(-found.high)} to {self.signed(-found.low)})"
        return text


def measures(study: Mapping[str, Any]) -> tuple[Measure, ...]:
    """Every metric of a run, the loss among them."""
    metrics = study.get("metrics")
    if not isinstance(metrics, list):
        return (Measure("loss", "lower", ".4f"), Measure())
    ok = [one for one in metrics if isinstance(one, Mapping) and {"name", "better", "format"} <= set(one)]
    return tuple(Measure(str(one["name"]), str(one["better"]), str(one["format"])) for one in ok)
