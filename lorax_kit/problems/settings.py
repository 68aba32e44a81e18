"""Settings of a problem as plain data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self

from lorax_kit.errors import StudyError
from lorax_kit.problem import Problem


class Settings(ABC):
    """What the settings of a problem have, which are a frozen dataclass each."""

    @abstractmethod
    def build(self) -> Problem:
        """Load weights and data."""

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """From JSON data.

        Raises:
          StudyError: no object, unknown keys, values out of range.
        """
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        if not isinstance(data, Mapping):
            raise StudyError(f"a problem must be an object, not {type(data).__name__}.")
        if unknown := sorted(set(data) - set(known)):
            raise StudyError(f"problem has the unknown key {', '.join(map(repr, unknown))}; known: {', '.join(known)}.")
        return cls(**data)
