"""The problem that a configuration or a saved adapter names: one of the package's own, or a user's by its address."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lorax_kit.checkpoint.adapter import read_document
from lorax_kit.core.paths import Params
from lorax_kit.errors import AdapterError, StudyError
from lorax_kit.problem import Problem, problem_at
from lorax_kit.problem.base import based
from lorax_kit.problems.packaged.plays import PlaysText
from lorax_kit.problems.packaged.sentiment import Sentiment, adapter_folder

OWN: dict[str, Any] = {"sentiment": Sentiment, "plays": PlaysText}


def problem_from(data: Any) -> Problem:
    """Load a problem.

    Args:
      data: "module:object"; or an object of settings with "address", or with the "name" of one of the package's own
        ("sentiment", which is the default, "plays").

    Raises:
      StudyError: an unknown name, an address that leads nowhere, settings that it does not take.
    """
    if isinstance(data, str):
        return problem_at(data)
    if not isinstance(data, Mapping):
        raise StudyError(f"a problem must be an object or 'module:object', not {type(data).__name__}.")
    settings = dict(data)
    if "address" in settings:
        return problem_at(settings.pop("address"), settings)
    name = settings.pop("name", "sentiment")
    if name not in OWN:
        raise StudyError(f"problem {name!r} is unknown; choose from {', '.join(OWN)}, or give an address.")
    made: Problem = OWN[name].from_dict(settings).build()
    return made


def problem_of(adapter: str | Path, address: str | None = None) -> Problem:
    """The problem that a saved adapter was trained on.

    Args:
      address: in place of the one that the adapter remembers.

    Raises:
      AdapterError: no adapter, a damaged one, or one that does not say.
      StudyError: an address that leads nowhere.
    """
    path = adapter_folder(adapter)
    meta = read_document(path)["meta"]
    settings = meta.get("settings")
    if address is not None or meta.get("address"):
        given = settings if isinstance(settings, Mapping) else None
        same = address == meta.get("address")
        return problem_at(
            address or meta["address"], given if same or address is None else None, remembered=address is None
        )
    if not isinstance(settings, Mapping) or meta.get("problem") not in OWN:
        raise AdapterError(
            f"the adapter at {str(path)!r} does not say which problem it was trained on.\n"
            "  give its address: --problem module:object"
        )
    made: Problem = OWN[meta["problem"]].from_dict(dict(settings)).build()
    return made


def base_of(problem: Problem, adapter: str | Path) -> Params:
    """The base of a saved adapter: the problem's, cast or quantised as its study had it."""
    form = read_document(adapter)["meta"].get("base_form") or {}
    params = problem.params(jax.random.key(0))
    return based(params, form.get("dtype"), form.get("quantise"), tuple(form.get("paths", ())))
