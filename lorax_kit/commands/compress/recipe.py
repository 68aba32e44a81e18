"""How a model is made smaller and how a smaller one is healed, as plain data that is checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lorax_kit.compress import ALLOCATIONS, METHODS, PRUNINGS
from lorax_kit.compress.arguments import check_count, check_number, check_positive, check_share, check_word
from lorax_kit.core.quantised import METHODS as QUANTISATIONS
from lorax_kit.errors import CompressError

STUDENT = "student"
TUNED = "original_tuned"
"""The original, as large as it is, trained as long as a smaller one is healed: what healing is to be compared with."""
ALL_METHODS = (
    *METHODS,
    *(f"{m}+{q}" for m in METHODS for q in QUANTISATIONS),
    *(f"{m}+residual-{q}" for m in METHODS for q in QUANTISATIONS),
    *(*PRUNINGS, "magnitude-2:4", "wanda-2:4"),
    *QUANTISATIONS,
    STUDENT,
    TUNED,
)


class Method(NamedTuple):
    """A method's parts.

    Attributes:
      name: as given.
      kind: "low-rank", "pruned", "quantised", "student" or "tuned".
      base: the decomposition or pruning.
      bits: how factors, or with `residual` what they leave, are quantised; "" for not at all.
      residual: whether what the factors leave is kept.
      pattern: of pruning.
    """

    name: str
    kind: str
    base: str
    bits: str = ""
    residual: bool = False
    pattern: str = "unstructured"

    @classmethod
    def parse(cls, name: str) -> Method:
        """From one of ALL_METHODS.

        Raises:
          CompressError: it is none.
        """
        if name not in ALL_METHODS:
            known = ", ".join((*METHODS, *PRUNINGS, "magnitude-2:4", "wanda-2:4", *QUANTISATIONS, STUDENT, TUNED))
            raise CompressError(
                f"method {name!r} is unknown; choose from {known}; or add +int8, +int4, +nf4, +residual-int8, "
                f"+residual-int4 or +residual-nf4 to {', '.join(METHODS)}."
            )
        if name in (STUDENT, TUNED):
            return cls(name, "student" if name == STUDENT else "tuned", name)
        if name in QUANTISATIONS:
            return cls(name, "quantised", name, name)
        base, _, extra = name.partition("+")
        if base in METHODS:
            return cls(name, "low-rank", base, extra.removeprefix("residual-"), extra.startswith("residual-"))
        base, _, pattern = name.partition("-")
        return cls(name, "pruned", base, pattern=pattern or "unstructured")

    @property
    def calibrated(self) -> bool:
        """Whether it reads calibration data."""
        return self.base in (*METHODS, "wanda") and self.base != "svd"

    def wants_gradients(self, allocation: str) -> bool:
        """Whether it reads gradients of the loss, too."""
        return self.base == "fisher" or (self.base == "whitened" and allocation == "loss")

    @property
    def healed(self) -> bool:
        """Whether training can follow."""
        return self.kind != "quantised"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is made smaller. JSON out is `dataclasses.asdict(recipe)`, JSON in `Recipe(**data)`.

    Args:
      method: one of ALL_METHODS.
      keep: share of the targets' parameters (of each one's entries when pruning, of the layers for a student). Methods
        that leave nothing out have 1, whatever is given.
      allocation: of ranks: "loss", "energy" or "uniform".
      sequential: compress layer after layer, each calibrated anew.
      batches: of calibration.

    Raises:
      CompressError: an unknown method or allocation, a number out of range, a method that does not go layer by layer.
    """

    method: str
    keep: float = 0.5
    allocation: str = "loss"
    sequential: bool = False
    batches: int = 16

    def __post_init__(self) -> None:
        keep = check_share("keep", self.keep)
        object.__setattr__(self, "keep", 1.0 if self.way.kind in ("quantised", "tuned") else keep)
        check_word("allocation", self.allocation, ALLOCATIONS)
        check_count("batches", self.batches)
        if not isinstance(self.sequential, bool):
            raise CompressError(f"sequential is {self.sequential!r}; it must be true or false.")
        if self.sequential and not (self.way.kind == "low-rank" and self.way.calibrated):
            raise CompressError(
                f"{self.method!r} does not go layer by layer: only fisher, asvd and whitened read data anew."
            )

    @property
    def way(self) -> Method:
        """The method's parts."""
        return Method.parse(self.method)


@dataclass(frozen=True, kw_only=True)
class Healing:
    """How a smaller model is trained to do what the original does. JSON as of `Recipe`.

    Low-rank models are healed before their factors are quantised, pruned ones with their zeros as they are, and
    students are trained, in full: at a tenth of `lr`, or where `rank` is None at `lr` itself. "original_tuned" makes
    nothing smaller, and trains the targets likewise.

    Args:
      steps: of training; 0 for no healing.
      lr: peak rate.
      rank: of the updates; None trains the parameters themselves.
      share: how much of the loss follows the original's outputs; the rest follows the labels.
      seed: of the order of the data, and of the updates.

    Raises:
      CompressError: a number out of range.
    """

    steps: int = 0
    lr: float = 1e-3
    rank: int | None = 8
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 0)
        check_positive("lr", self.lr)
        if self.rank is not None:
            check_count("rank", self.rank)
        if check_number("share", self.share, 0.0) > 1:
            raise CompressError(f"share is {self.share!r}; it must lie in [0, 1].")
        check_count("seed", self.seed, 0)

    def check(self, recipe: Recipe) -> None:
        """Raise `CompressError` where these steps cannot follow the recipe: before any work."""
        way = recipe.way
        if not self.steps:
            if way.kind == "tuned":
                raise CompressError(f"{way.name!r} is the original after some steps: say how many.")
            return
        if not way.healed:
            raise CompressError(
                f"{way.name!r} leaves nothing low-rank to heal.\n  heal svd, fisher, asvd, whitened, magnitude or wanda"
            )
        if way.kind == "low-rank" and self.rank is not None and self.steps < 2:
            raise CompressError("healing takes 2 steps at least: one for each side of the products.")
        if way.kind in ("low-rank", "pruned") and recipe.keep == 1:
            raise CompressError(f"keep is 1: nothing becomes {way.kind}, and nothing can be healed.")
