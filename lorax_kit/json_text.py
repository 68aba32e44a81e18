"""JSON text of any origin: whatever is wrong with it is a `ValueError` of one line; our own is sealed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zlib import crc32

MOST_DIGITS = 300
"""Of an integer: fewer than floats hold, and than the few thousand that Python itself refuses to read or write.

Hugging Face writes 10^30 for "no limit" into configs of tokenizers."""
SEAL = "lorax_crc32"
"""Last key of an object that this package wrote: the CRC-32 of the text before it. Texts without it are read, too."""
_KEY = f'"{SEAL}": "'.encode()
_LENGTH = len(_KEY) + len('01234567"}')


def sealed_json(data: dict[str, Any], indent: int | None = None) -> str:
    """Write an object as JSON that tells, when `parse_json` reads it, whether a bit of it changed.

    Example:
      >>> sealed_json({"rank": 8})
      '{"rank": 8, "lorax_crc32": "2c69eb3d"}'
    """
    body = json.dumps(data, indent=indent)[:-1].rstrip()
    body += ("," if data else "") + (" " if indent is None else "\n" + " " * indent)
    return f'{body}{_KEY.decode()}{crc32(body.encode()):08x}"}}'


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text.

    Raises:
      ValueError: bytes that are not UTF-8, text that is not JSON, nests too deeply, has a key twice in one object,
        holds an integer of more than 300 digits, or is not as `sealed_json` wrote it; in one line, without a full stop.

    Example:
      >>> parse_json(b'{"rank": 8}')
      {'rank': 8}
    """
    try:
        _check_seal(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, parse_int=_integer, object_pairs_hook=_object)
    except UnicodeDecodeError as e:
        raise ValueError(f"byte {e.start} is not UTF-8 text") from None
    except json.JSONDecodeError as e:
        raise ValueError(str(e)) from None
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if isinstance(value, dict):
        value.pop(SEAL, None)
    return value


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


def _check_seal(text: bytes) -> None:
    """Raise `ValueError` where the text ends with a seal, whole or damaged, that is not of what stands before it."""
    text = text.rstrip()
    body, key = text[:-_LENGTH], text[-_LENGTH:][: len(_KEY)]
    if not body or sum(a != b for a, b in zip(key, _KEY, strict=True)) > 3:
        return
    if text[len(body) :] != _KEY + f'{crc32(body):08x}"}}'.encode():
        raise ValueError(f"it is not as it was written; if you changed it yourself, take {SEAL!r} out of it")


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
