"""Problems by address, "module:object": so that commands and saved adapters can name a user's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lorax_kit.core.setting import shown
from lorax_kit.errors import StudyError
from lorax_kit.problem.problem import Problem

Builder = TypeVar("Builder", bound=Callable[..., Problem])
MARK = "__lorax_kit_builds_a_problem__"


def problem_builder(function: Builder) -> Builder:
    """Mark a function that builds an `lk.Problem`, so that an address may call it.

    Addresses stand in configurations and in saved adapters, which come from anywhere: only what is marked is called.

    Example:
      >>> @problem_builder
      ... def build(length: int = 32): ...
    """
    setattr(function, MARK, True)
    return function


def problem_at(address: str, settings: Mapping[str, Any] | None = None) -> Problem:
    """The problem at an address; its facts and its adapters remember both.

    Args:
      address: "module:object", a `Problem` or a function marked by `lk.problem_builder`. The working directory is
        searched, too. Importing a module runs it.
      settings: keywords of the function; JSON data.

    Raises:
      StudyError: no such module or object, another kind of object, settings that it does not take.
    """
    module, _, path = address.partition(":") if isinstance(address, str) else ("", "", "")
    if not module or not path:
        raise StudyError(f"problem address {shown(address)} must be 'module:object'.")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as e:
        raise StudyError(f"the problem at {address!r} cannot be imported: {e}.") from None
    finally:
        if added:
            sys.path.remove(here)
    if isinstance(found, Problem):
        if settings:
            raise StudyError(f"{address!r} is a problem, which takes no settings; there are {', '.join(settings)}.")
        made = found
    elif callable(found) and getattr(found, MARK, False):
        try:
            made = found(**(settings or {}))
        except TypeError as e:
            raise StudyError(f"the problem at {address!r} does not take these settings: {e}.") from None
        if not isinstance(made, Problem):
            raise StudyError(f"{address!r} builds a {type(made).__name__}, and must build an lk.Problem.")
    else:
        raise StudyError(
            f"{address!r} is neither an lk.Problem nor a function marked to build one.\n  mark it: @lk.problem_builder"
        )
    return replace(made, address=address, facts={**made.facts, "settings": dict(settings or {})})
