"""Which modules of a torch model an adapter_config.json adapts or keeps whole, by PEFT's own rules of matching.

They are not alike: a list of targets matches the ends of names at a dot, or a whole name whatever its layer; a string is
a regular expression of the whole name; modules_to_save matches any end of a name, dot or not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lorax_kit.core.errors import AdapterError
from lorax_kit.core.paths import closest
from lorax_kit.peft.files import CONFIG

HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""What PEFT adds to modules_to_save by itself, whether the model has it or not."""


def listed(value: str | list[str] | None) -> list[str]:
    """A text or a list of them as a list."""
    return [value] if isinstance(value, str) else list(value or ())


def ends(name: str, entry: str) -> bool:
    """Whether a name is the entry, or ends in it at a dot."""
    return name == entry or name.endswith(f".{entry}")


def compiled(pattern: str, around: str = "{}") -> re.Pattern[str]:
    """A pattern of the config with what PEFT puts around it."""
    try:
        return re.compile(around.replace("{}", pattern))
    except (re.error, RecursionError, OverflowError) as e:
        raise AdapterError(f"{CONFIG} has the pattern {pattern[:80]!r}, not a regular expression: {e}.") from None


def by_module(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that is a module's name, or the end of it at a dot."""
    for pattern, value in patterns.items():
        if compiled(pattern, r"(.*\.)?({})$").match(name):
            return value
    return default


def layer_of(config: Mapping[str, Any], name: str) -> int | None:
    """The number of the layer that a module lies in: the first one, or the one after a name in layers_pattern."""
    patterns = listed(config.get("layers_pattern"))
    for pattern in patterns or [r"[^.]*"]:
        found = compiled(pattern, r"(?:^|.*?\.){}\.(?P<idx>\d+)\." if patterns else r".*?\.{}\.(?P<idx>\d+)\.").match(
            name
        )
        if found:
            return int(found["idx"])
    return None


def targeted(config: Mapping[str, Any], modules: Collection[str], notes: list[str]) -> set[str] | None:
    """Which of a model's modules the config adapts; None where it leaves that to PEFT ("all-linear").

    Args:
      notes: gets a line for each entry that matches nothing, which PEFT passes over.

    Raises:
      AdapterError: no entry matches anything.
    """
    wanted = config.get("target_modules")
    if wanted is None or (isinstance(wanted, str) and wanted.lower() == "all-linear"):
        return None
    whole = compiled(wanted) if isinstance(wanted, str) else None
    hits = {n for n in modules if (whole.fullmatch(n) if whole else any(ends(n, entry) for entry in wanted))}
    if wanted and not hits:
        entry = listed(wanted)[0]
        raise AdapterError(
            f"{CONFIG} targets {entry!r}, which is no module of this base.\n"
            f"  closest: {closest(entry, sorted(modules))}\n"
            "  is it the adapter of another model, or does `names` lack a prefix or a module?"
        )
    for key in ("target_modules", "exclude_modules"):
        value = config.get(key)
        for entry in value if isinstance(value, list) else ():
            if not any(ends(n, entry) for n in modules):
                notes.append(f"{key} has {entry!r}, which matches nothing")
    layers = config.get("layers_to_transform")
    if layers is not None and layers != []:
        if whole:
            notes.append("layers_to_transform is passed over where target_modules is a pattern")
        else:
            chosen = [layers] if isinstance(layers, int) else layers
            found = {name: layer_of(config, name) for name in hits}
            for layer in sorted(set(chosen) - {n for n in found.values() if n is not None}):
                notes.append(f"layers_to_transform has {layer}, where no module is targeted")
            hits = {name for name in hits if name in wanted or found[name] in chosen}
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str) and excluded:
        without = compiled(excluded)
        hits = {name for name in hits if not without.fullmatch(name)}
    elif excluded:
        hits = {name for name in hits if not any(ends(name, entry) for entry in excluded)}
    saved = [compiled(entry, r"(^|.*\.){}($|\..*)") for entry in config.get("modules_to_save") or ()]
    return {name for name in hits if not any(pattern.match(name) for pattern in saved)}


def targeted_parameters(config: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """Which parameters target_parameters names, by their whole name or its end at a dot."""
    entries = config.get("target_parameters") or ()
    return {name for name in names if any(ends(name, entry) for entry in entries)}


def unmatched_parameters(config: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Notes on the entries of target_parameters that match nothing, which PEFT passes over."""
    entries = config.get("target_parameters") or ()
    return [
        f"target_parameters has {x!r}, which matches nothing" for x in entries if not any(ends(n, x) for n in names)
    ]


def kept_whole(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT trains a parameter in full, by modules_to_save."""
    return any(_keeps(entry, name) for entry in config.get("modules_to_save") or ())


def _keeps(entry: str, name: str) -> bool:
    parts = name.split(".")
    # As in PEFT: the end of a name, not a whole part of it.
    return any(".".join(parts[:i]).endswith(entry) for i in range(1, len(parts)))


def check_kept(config: Mapping[str, Any], names: Collection[str], notes: list[str]) -> None:
    """Note the heads that PEFT lists by itself; raise `AdapterError` at another entry of modules_to_save without tensor."""
    own = HEADS.get(str(config.get("task_type")), ())
    for entry in config.get("modules_to_save") or ():
        if any(_keeps(entry, name) for name in names):
            continue
        if entry not in own:
            raise AdapterError(f"{CONFIG} has {entry!r} in modules_to_save, but no tensor of it was saved.")
        notes.append(f"modules_to_save has {entry!r}, of which no tensor was saved")


def exactly(name: str) -> str:
    """A regular expression that PEFT matches against this name alone."""
    return f"^{re.escape(name)}"


def targets_for(wanted: Collection[str], modules: Collection[str]) -> str | list[str]:
    """target_modules that take these modules and no other: their names, or a pattern where one ends as another."""
    names = sorted(wanted)
    if any(ends(other, name) for name in names for other in set(modules) - set(names)):
        return f"({'|'.join(re.escape(name) for name in names)})"
    return names


def with_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, so that patterns are few, and patterns for the modules of another."""
    default = Counter(values.values()).most_common(1)[0][0]
    return default, {exactly(name): x for name, x in values.items() if x != default}
