"""The JSON beside an adapter's factors: what may be written, and every key of the kind that loading needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_kit.checkpoint.seal import damaged
from lorax_kit.core.paths import Params, paths
from lorax_kit.core.plan import match
from lorax_kit.core.site import USES, Axes
from lorax_kit.core.specs.setting import Setting, is_int, shown
from lorax_kit.core.specs.spec import Spec
from lorax_kit.errors import AdapterError
from lorax_kit.json_text import parse_json

AXES = ("inputs", "outputs", "stack")


def kept_by_json(meta: Any) -> dict[str, Any]:
    """What a writer adds, which JSON must give back equal.

    Raises:
      AdapterError: it does not: keys that are no strings, tuples, objects.
    """
    try:
        data = dict(meta or {})
        text = json.dumps(data)
        odd = _changed("meta", data, parse_json(text))
    except (TypeError, ValueError, RecursionError) as e:
        why = str(e) or type(e).__name__
        raise AdapterError(f"meta is not JSON data: {why}; nothing was saved.") from None
    if odd is not None:
        raise AdapterError(
            f"{odd}: JSON does not give it back equal; nothing was saved.\n"
            "  give dicts with string keys, lists, strings, numbers, booleans and None"
        )
    return data


def _changed(where: str, x: Any, again: Any) -> str | None:
    """What of `x` JSON gives back as something else, or None."""
    if isinstance(x, dict):
        for key, value in x.items():
            if not isinstance(key, str):
                return f"{where} has the key {shown(key)}"
            if (odd := _changed(f"{where}[{key!r}]", value, again[key])) is not None:
                return odd
        return None
    if isinstance(x, list):
        parts = (_changed(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(x, again, strict=True)))
        return next((odd for odd in parts if odd is not None), None)
    if isinstance(x, tuple):
        return f"{where} is the tuple {shown(x)}"
    equal = x == again or (x != x and again != again)
    return None if equal else f"{where} is {shown(x)}"


def check_document(path: Path, document: Any) -> None:
    """Raise `AdapterError` unless all that loading reads is there, and of its kind; the spec reads itself."""

    def need(ok: bool, key: str, value: Any, wanted: str) -> None:
        if not ok:
            raise damaged(path, f"{key} of its JSON is {shown(value)}, not {wanted}")

    need(isinstance(document, dict), "the whole", document, "an object")
    for key in ("format", "spec", "base", "arrays", "axes", "versions", "meta"):
        if key not in document:
            raise damaged(path, f"its JSON has no {key!r}")
    need(is_int(document["format"]), "'format'", document["format"], "an integer")
    need(isinstance(document["base"], str), "'base'", document["base"], "a fingerprint")
    for key in ("arrays", "axes", "versions", "meta", "same", "leaves"):
        section = document.get(key, {})
        need(isinstance(section, dict), repr(key), section, "an object")
    for name, x in document["arrays"].items():
        where = f"'arrays' at {name!r}"
        need(isinstance(x, dict) and {"shape", "dtype"} <= set(x), where, x, "a shape and a dtype")
        need(_is_sizes(x["shape"]), f"the shape in {where}", x["shape"], "a list of sizes")
        need(_is_dtype(x["dtype"]), f"the dtype in {where}", x["dtype"], "the name of a dtype")
    for name, other in document.get("same", {}).items():
        ok = isinstance(other, str) and other in document["arrays"] and name not in document["arrays"]
        need(ok, f"'same' at {name!r}", other, "the name of another array")
    for name, x in document.get("leaves", {}).items():
        ok = isinstance(x, list) and len(x) == 4 and _is_sizes(x[1]) and all(isinstance(x[i], str) for i in (0, 2, 3))
        need(ok, f"'leaves' at {name!r}", x, "a dtype, a shape, a form and a checksum")
    for name, x in document["axes"].items():
        where = f"'axes' at {name!r}"
        need(isinstance(x, dict) and {*AXES, "use"} <= set(x), where, x, f"an object of {', '.join(AXES)} and use")
        for key in AXES:
            need(_is_sizes(x[key]), f"{key} of {where}", x[key], "a list of axes")
        need(x["use"] in USES, f"use of {where}", x["use"], f"one of {', '.join(USES)}")


def axes_of(path: Path, document: Mapping[str, Any], spec: Spec, base: Params) -> dict[str, tuple[Axes, str]]:
    """Path -> (axes, use) of every site that the spec has in this base.

    Raises:
      AdapterError: a site without axes, axes that are not all those of its parameter, or axes of what is no site.
      PlanError: a spec that does not fit the base.
    """
    shapes = {name: leaf.shape for name, leaf in paths(base).items()}
    sites = [name for name, setting in match(spec, base).items() if isinstance(setting, Setting)]
    odd = min({*sites} ^ {*document["axes"]}, default=None)
    if odd is not None:
        has, does = ("lacks", "adapts") if odd in sites else ("has", "does not adapt")
        raise damaged(path, f"'axes' of its JSON {has} {odd!r}, which its spec {does}")
    out = {}
    for name in sites:
        x = document["axes"][name]
        ndim = len(shapes[name])
        if sorted(i for key in AXES for i in x[key]) != list(range(ndim)):
            stored = ", ".join(f"{key} {x[key]}" for key in AXES)
            raise damaged(path, f"'axes' of its JSON at {name!r} has {stored}, not each of the {ndim} axes once")
        out[name] = Axes(**{key: tuple(x[key]) for key in AXES}), x["use"]
    return out


def check_arrays(path: Path, document: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `AdapterError` unless the arrays on disk are those of the plan: what it does not use would be dropped."""
    stored, same = document["arrays"], document.get("same", {})
    for name, shape in expected.items():
        have = stored.get(same.get(name, name), {}).get("shape")
        if have != list(shape):
            raise damaged(path, f"it has {name!r} of shape {have}, its spec expects {list(shape)}")
    unused = min({*stored, *same} - {*expected}, default=None)
    if unused is not None:
        raise damaged(path, f"it has {unused!r}, which its spec has no use for")


def _is_sizes(x: Any) -> bool:
    return isinstance(x, list) and all(is_int(n) and n >= 0 for n in x)


def _is_dtype(x: Any) -> bool:
    try:
        return isinstance(x, str) and np.dtype(x).name == x
    except (TypeError, ValueError, SyntaxError):
        return False
