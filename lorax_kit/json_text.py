"""JSON text of any origin: whatever is wrong with it is a `ValueError` of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_DIGITS = 300
"""Of an integer: fewer than floats hold, and than the few thousand that Python itself refuses to read or write.

Hugging Face writes 10^30 for "no limit" into configs of tokenizers."""


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text.

    Raises:
      ValueError: bytes that are not UTF-8, text that is not JSON, nests too deeply, has a key twice in one object, or
        holds an integer of more than 300 digits; in one line, without a full stop.

    Example:
      >>> parse_json(b'{"rank": 8}')
      {'rank': 8}
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, parse_int=_integer, object_pairs_hook=_object)
    except UnicodeDecodeError as e:
        raise ValueError(f"byte {e.start} is not UTF-8 text") from None
    except json.JSONDecodeError as e:
        raise ValueError(str(e)) from None
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def read_json(file: str | Path) -> Any:
    """`parse_json` what a file holds; raises `OSError`, too."""
    return parse_json(Path(file).read_bytes())


def first_difference(was: Any, now: Any, name: str = "") -> tuple[str, Any, Any]:
    """(name, the one, the other) of the first value that differs: of objects within objects, the innermost.

    Example:
      >>> first_difference({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 2}})
      ('b, d', 3, None)
    """
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return name, was, now
    odd = min(key for key in {*was, *now} if was.get(key) != now.get(key) or (key in was) != (key in now))
    return first_difference(was.get(odd), now.get(odd), f"{name}, {odd}" if name else odd)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON leaves open which of two values counts; taking the last one would drop the other without a word."""
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} stands twice in one object")
    return made


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"it holds a number of {len(digits.lstrip('-')):,} digits")
    return int(digits)
