"""Settings of a problem as plain data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lorax_kit.errors import StudyError
from lorax_kit.problem import Problem

if TYPE_CHECKING:
    from lorax_kit.data import Row
    from lorax_kit.problems.parts.asked import Asked


class Settings(ABC):
    """What the settings of a problem have, which are a frozen dataclass each."""

    writes: ClassVar[bool] = False
    """Whether the model writes texts."""

    @abstractmethod
    def build(self) -> Problem:
        """Load weights and data."""

    @property
    def asked_columns(self) -> dict[str, str]:
        """Role -> column, of what must be known of a row for `to_answer`."""
        return {}

    def to_answer(self, rows: Sequence[Row], facts: Mapping[str, Any]) -> Asked:
        """Rows without their answers, for a trained model to answer.

        Args:
          rows: with the cells of `asked_columns`.
          facts: what an adapter remembers of the problem, "length" and "labels" among them.

        Raises:
          StudyError: a task whose model writes.
          DataError: a row of another form.
        """
        raise StudyError("the model writes, and gives no answer to a row.\n  lorax-kit generate ADAPTER --prompt TEXT")

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """From JSON data.

        Raises:
          StudyError: no object, unknown or missing keys, values out of range.
        """
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        if not isinstance(data, Mapping):
            raise StudyError(f"a problem must be an object, not {type(data).__name__}.")
        if unknown := sorted(set(data) - set(known)):
            raise StudyError(f"problem has the unknown key {', '.join(map(repr, unknown))}; known: {', '.join(known)}.")
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
        if missing := [name for name in needed if name not in data]:
            raise StudyError(f"problem lacks {', '.join(map(repr, missing))}.")
        return cls(**data)
