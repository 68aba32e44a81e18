"""The settings that tell trials apart beside rank, rate, targets, variant and alpha; columns that a run may lack."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorax_kit.report.run_folder import Record

DEFAULTS: dict[str, Any] = {
    "start": "kaiming",
    "dropout": 0.0,
    "optimizer": "adamw",
    "weight_decay": 0.0,
    "lr_ratio": 1.0,
    "dtype": None,
    "quantise": None,
    "batch_size": None,
    "accumulate": 1,
}
"""Column -> what a trial without it was trained with."""
PREFIX = "hyper_"
"""What columns of scalars that the optimiser or the loss reads begin with."""
METHOD = "settings"
"""The column of further settings of a trial's method, a mapping."""


def settings_of(trial: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a trial by name; those of its method as `settings.<name>`. Missing ones are the defaults.

    Example:
      >>> settings_of({"dropout": 0.1, "hyper_beta": 2})["dropout"], settings_of({"settings": {"factor": 8}})
      (0.1, {'start': 'kaiming', ..., 'settings.factor': 8})
    """
    values = {name: default if trial.get(name) is None else trial[name] for name, default in DEFAULTS.items()}
    values |= {name: value for name, value in trial.items() if name.startswith(PREFIX)}
    method = trial.get(METHOD)
    return values | ({f"{METHOD}.{name}": x for name, x in method.items()} if isinstance(method, Mapping) else {})


def varying(trials: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The settings that differ among trials; those of a method, where they differ within it.

    The probe's trials (rank 0) count only where no other is given.

    Example:
      >>> trials = [{"rank": 1, "dropout": x, "optimizer": "adafactor"} for x in (0.0, 0.1)]
      >>> varying(trials)
      ('dropout',)
    """
    trials = list(trials)
    adapted = [trial for trial in trials if trial["rank"] > 0] or trials
    per_trial = [settings_of(trial) for trial in adapted]
    names = dict.fromkeys(name for settings in per_trial for name in settings)
    differing = []
    for name in names:
        seen: dict[Any, set[str]] = {}
        for trial, settings in zip(adapted, per_trial, strict=True):
            group = str(trial.get("variant")) if name.startswith(f"{METHOD}.") else ""
            seen.setdefault(group, set()).add(_key(settings.get(name)))
        if any(len(values) > 1 for values in seen.values()):
            differing.append(name)
    return tuple(differing)


def rest_of(trial: Mapping[str, Any], names: Sequence[str]) -> str:
    """The settings `names` of a trial in words, but for those at their defaults.

    Example:
      >>> rest_of({"dropout": 0.1, "optimizer": "adafactor", "dtype": None}, ("dropout", "optimizer", "dtype"))
      'dropout 0.1, adafactor'
    """
    settings = settings_of(trial)
    shown = [name for name in names if not (name in DEFAULTS and _key(settings[name]) == _key(DEFAULTS[name]))]
    shown = [name for name in shown if not name.startswith(PREFIX) or settings.get(name) is not None]
    return ", ".join(_words(name, settings.get(name)) for name in shown)


def setting_columns(trials: Sequence[Record]) -> tuple[str, ...]:
    """The columns of rows whose settings differ among them, those of methods together in one."""
    columns: dict[str, set[str]] = {}
    for trial in trials:
        for name in (*DEFAULTS, METHOD, *(key for key in trial if key.startswith(PREFIX))):
            columns.setdefault(name, set())
    for name, values in columns.items():
        values |= {_key(DEFAULTS.get(name) if trial.get(name) is None else trial[name]) for trial in trials}
    return tuple(name for name, values in columns.items() if len(values) > 1)


def _words(name: str, value: Any) -> str:
    word = name.removeprefix(PREFIX).removeprefix(f"{METHOD}.").replace("_", " ")
    if value is None:
        return f"no {word}"
    if isinstance(value, bool):
        return word if value else f"no {word}"
    if isinstance(value, int | float):
        return f"{word} {value:g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if name in DEFAULTS else f"{word} {text}"


def _key(value: Any) -> str:
    """What equal values share: 0 and 0.0 are equal, 1 and True are not."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(float(value))
    return json.dumps(value, sort_keys=True, default=str)
