"""Sizes in a config.json: read under the names that a family gives them, and checked by the fields of a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
WANTED = {"int": "an integer of at least 1", "float": "a finite number above 0", "bool": "true or false", "str": "text"}
MOST = 2**31
"""No size reaches it: indices are int32."""


def read_sizes(
    config: type[Any],
    data: Any,
    model_types: tuple[str, ...],
    names: Mapping[str, str],
    *,
    absent: Mapping[str, Any],
    only: Mapping[str, Any],
) -> dict[str, Any]:
    """The fields of a config class from a config.json's content.

    Args:
      names: field -> its name in the file, where that is another.
      absent: field -> what holds where the file has no value.
      only: name in the file -> the one value that the model computes, which is also what an absent one means.

    Raises:
      ValueError: no object, another model_type, a missing size, or a setting that the model does not compute.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"config.json must be an object, not {type(data).__name__}.")
    if data.get("model_type", model_types[0]) not in model_types:
        known = ", ".join(map(repr, model_types))
        raise ValueError(f"config.json has model_type {data['model_type']!r}; this model computes only {known}.")
    for key, value in only.items():
        if data.get(key, value) != value:
            raise ValueError(f"config.json has {key} {data[key]!r}; this model computes only {value!r}.")
    keys = {field.name: names.get(field.name, field.name) for field in fields(config)}
    given = {name: data[theirs] for name, theirs in keys.items() if data.get(theirs) is not None}
    sizes = {**absent, **given}
    missing = [theirs for name, theirs in keys.items() if name not in sizes]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}.")
    return {name: sizes[name] for name in keys}


def check_sizes(config: Any, may_be_zero: tuple[str, ...] = ()) -> None:
    """Raise `ValueError` where a field of a config is not of its kind, or a number is not above 0.

    Fields are int, float, bool or str, or one of them or None; others are left to the config.
    """
    for field in fields(config):
        kind, _, optional = str(field.type).partition(" | ")
        value, zero = getattr(config, field.name), field.name in may_be_zero
        if kind not in KINDS or (optional and value is None):
            continue
        number = kind in ("int", "float")
        if type(value) not in KINDS[kind] or (number and not (0 < value < math.inf or (zero and value == 0))):
            wanted = WANTED[kind].replace("at least 1", "at least 0") if zero else WANTED[kind]
            raise ValueError(f"{field.name} is {value!r}; it must be {wanted}.")
        if number and value >= MOST:
            raise ValueError(f"{field.name} is {value!r}; it must be below 2^31.")


def expect_whole_heads(heads: int, hidden_size: int) -> None:
    """Raise `ValueError` where heads do not divide the hidden size."""
    if hidden_size % heads:
        raise ValueError(f"{heads} heads do not divide hidden_size {hidden_size}.")
