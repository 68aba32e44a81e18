"""The problem that a configuration or a saved adapter names: one of the package's own, or a user's by its address."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lorax_kit.checkpoint.adapter import read_meta
from lorax_kit.core.paths import Params
from lorax_kit.core.specs.setting import shown
from lorax_kit.errors import AdapterError, StudyError
from lorax_kit.problem import Problem, problem_at
from lorax_kit.problem.base import based
from lorax_kit.problems.answer import Answer
from lorax_kit.problems.chat import Chat
from lorax_kit.problems.choose import Choose
from lorax_kit.problems.classify import Classify
from lorax_kit.problems.language import Language
from lorax_kit.problems.packaged.plays import PlaysText
from lorax_kit.problems.packaged.sentiment import Sentiment, adapter_folder
from lorax_kit.problems.parts.asked import Asked
from lorax_kit.problems.parts.rows import TextSettings
from lorax_kit.problems.regress import Regress
from lorax_kit.problems.settings import Settings
from lorax_kit.problems.translate import Translate

FILES = ("data", "val_data", "test_data")
PACKAGED: dict[str, type[Settings]] = {"sentiment": Sentiment, "plays": PlaysText}
TASKS: dict[str, type[TextSettings]] = {
    "classify": Classify,
    "regress": Regress,
    "lm": Language,
    "qa": Answer,
    "chat": Chat,
    "translate": Translate,
    "choose": Choose,
}


def problem_from(data: Any) -> Problem:
    """Load a problem.

    Args:
      data: "module:object"; or an object of settings: with "task" (and "data", a file of rows), with "address", or
        with the "name" of one of those on packaged data ("sentiment", which is the default, "plays").

    Raises:
      StudyError: an unknown name or task, an address that leads nowhere, settings that it does not take.
      DataError, ValueError, OSError: what the loaders of models and data raise.
    """
    if isinstance(data, str):
        return problem_at(data)
    if not isinstance(data, Mapping):
        raise StudyError(f"a problem must be an object or 'module:object', not {type(data).__name__}.")
    settings = dict(data)
    if "address" in settings:
        return problem_at(settings.pop("address"), settings)
    return settings_from(settings).build()


def settings_from(data: Mapping[str, Any]) -> Settings:
    """The settings that a configuration or an adapter names, of what the package can build.

    Raises:
      StudyError: an unknown name or task, unknown keys, values out of range.
    """
    settings = dict(data)
    kind, known = ("task", TASKS) if "task" in settings else ("name", PACKAGED)
    name = settings.pop(kind, "sentiment")
    if not isinstance(name, str) or name not in known:
        who = "problem" if kind == "name" else "problem task"
        raise StudyError(f"{who} {shown(name)} is unknown; choose from {', '.join(known)}, or give an address.")
    made: Settings = known[name].from_dict(settings)
    return made


def problem_of(adapter: str | Path, address: str | None = None, files: Mapping[str, str] | None = None) -> Problem:
    """The problem that a saved adapter was trained on.

    Args:
      address: in place of the one that the adapter remembers.
      files: "data", "val_data" or "test_data" -> a file, in place of the one that the adapter remembers. "data" must be
        as it was, for what was trained on to be known; of the others any rows are.

    Raises:
      AdapterError: no adapter, a damaged one, or one that does not say; other files, and a problem that has none, or
        whose classes are others than the adapter's.
      FileNotFoundError: its rows lie elsewhere now.
      StudyError: an address that leads nowhere.
    """
    path = adapter_folder(adapter)
    meta = read_meta(path)
    settings = meta.get("settings")
    if files and (address is not None or not isinstance(settings, Mapping) or "task" not in settings):
        raise AdapterError(f"the adapter at {str(path)!r} was not trained on a file of rows: no other can be given.")
    if address is not None or meta.get("address"):
        given = settings if isinstance(settings, Mapping) else None
        same = address == meta.get("address")
        return problem_at(
            address or meta["address"], given if same or address is None else None, remembered=address is None
        )
    if not isinstance(settings, Mapping) or meta.get("problem") not in {*PACKAGED, *TASKS}:
        raise AdapterError(
            f"the adapter at {str(path)!r} does not say which problem it was trained on.\n"
            "  give its address: --problem module:object"
        )
    if "task" not in settings:
        return _remembered(meta).build()
    problem = settings_from(with_files(settings, files or {}, f"the adapter at {str(path)!r}")).build()
    had, has = meta.get("labels"), problem.facts.get("labels")
    if had is not None and list(had) != list(has or ()):
        raise AdapterError(
            f"the adapter at {str(path)!r} tells {', '.join(map(str, had))}; the rows given have the classes "
            f"{', '.join(map(str, has or ()))}."
        )
    return problem


def with_files(settings: Mapping[str, Any], files: Mapping[str, str], what: str) -> dict[str, Any]:
    """The settings of a task whose rows lie elsewhere now: those of "data" as they were, of the others any.

    Args:
      what: remembers the settings.

    Raises:
      FileNotFoundError: a file that is not there.
    """
    updated = {**settings, **files}
    for name in FILES:
        if updated.get(name) and not Path(updated[name]).is_file():
            raise FileNotFoundError(
                f"there is no file {updated[name]!r}, which {what} remembers.\n"
                f"  put it there, or say where it lies now: {name}=NEW"
            )
    kept = {name: x for name, x in (updated.get("sha256") or {}).items() if name == "data" or name not in files}
    return updated | {"sha256": kept or None}


def _remembered(meta: Mapping[str, Any]) -> Settings:
    """The settings in an adapter's document."""
    settings = meta["settings"]
    return settings_from(settings if "task" in settings else {"name": meta["problem"], **settings})


def settings_of(adapter: str | Path) -> Settings:
    """The settings of the problem that a saved adapter was trained on, which is not loaded.

    Raises:
      AdapterError: no adapter, a damaged one, or one of a problem of one's own.
    """
    path = adapter_folder(adapter)
    meta = read_meta(path)
    if meta.get("address") or not isinstance(meta.get("settings"), Mapping):
        raise AdapterError(
            f"the adapter at {str(path)!r} is of a problem of your own, whose model and inputs are not known here.\n"
            "  in Python: lk.load_adapter, and lk.adapt of the problem's apply"
        )
    return _remembered(meta)


def remembered_facts(adapter: str | Path) -> Mapping[str, Any]:
    """What a saved adapter remembers of the data it was trained on: "length", and "labels" of a classifier.

    Those of adapters that were saved without are found in the data.
    """
    path = adapter_folder(adapter)
    meta: Mapping[str, Any] = read_meta(path)
    return meta if "length" in meta or "task" not in meta["settings"] else problem_of(path).facts


def base_of(problem: Problem | Asked, adapter: str | Path) -> Params:
    """The base of a saved adapter: the problem's, cast or quantised as its study had it."""
    form = read_meta(adapter).get("base_form") or {}
    params = problem.params(jax.random.key(0))
    return based(params, form.get("dtype"), form.get("quantise"), tuple(form.get("paths", ())))
