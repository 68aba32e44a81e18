"""Path patterns: globs with `*`, `?`, `**`, `{a,b}` and `{0..5}`; or a regular expression after the prefix `re:`.

`*` and `?` stay within one name, `**` spans any number of names. A brace is spelled out into its alternatives, a range
of numbers (both ends included) into each of them, and each alternative must match on its own: `{query,valeu}` is an
error, not half a match.
"""

from __future__ import annotations

import re
from functools import lru_cache

from lorax_kit.errors import SpecError

REGEX_PREFIX = "re:"
_RANGE = re.compile(r"(\d{1,4})\.\.(\d{1,4})")


def expand_braces(pattern: str) -> tuple[str, ...]:
    """Spell out `{a,b}` (nesting allowed) and `{0..2}`: `x/{a,b}` -> `("x/a", "x/b")`."""
    if pattern.startswith(REGEX_PREFIX):
        return (pattern,)
    start = pattern.find("{")
    if start < 0:
        if "}" in pattern:
            raise SpecError(f"pattern {pattern!r}: '}}' without '{{'.")
        return (pattern,)
    depth, parts, last = 0, [], start + 1
    for i in range(start, len(pattern)):
        char = pattern[i]
        depth += (char == "{") - (char == "}")
        if depth == 1 and char == ",":
            parts.append(pattern[last:i])
            last = i + 1
        if depth == 0:
            parts.append(pattern[last:i])
            head, tail = pattern[:start], pattern[i + 1 :]
            spelled = (x for part in parts for x in _numbers(part, pattern))
            return tuple(x for part in spelled for x in expand_braces(head + part + tail))
    raise SpecError(f"pattern {pattern!r}: '{{' is never closed.")


def _numbers(part: str, pattern: str) -> list[str]:
    """The numbers of a range `3..5`, or the part itself."""
    ends = _RANGE.fullmatch(part)
    if ends is None:
        return [part]
    first, last = int(ends[1]), int(ends[2])
    if first > last:
        raise SpecError(f"pattern {pattern!r}: the range {part} is empty.\n  the smaller number comes first")
    return [str(n) for n in range(first, last + 1)]


def literal(path: str) -> str:
    """The pattern that matches this path alone."""
    return f"{REGEX_PREFIX}{re.escape(path)}" if set(path) & set("*?{}") or path.startswith(REGEX_PREFIX) else path


@lru_cache(maxsize=1024)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """One alternative (no braces left) as a regular expression for `fullmatch`."""
    if pattern.startswith(REGEX_PREFIX):
        try:
            return re.compile(pattern[len(REGEX_PREFIX) :])
        except re.error as e:
            raise SpecError(f"pattern {pattern!r} is not a regular expression: {e}.") from None
    out, i = [], 0
    while i < len(pattern):
        if pattern.startswith("**/", i):
            out.append("(?:[^/]+/)*")
            i += 3
        elif pattern.startswith("**", i):
            out.append(".*")
            i += 2
        elif pattern[i] in "*?":
            out.append("[^/]*" if pattern[i] == "*" else "[^/]")
            i += 1
        else:
            out.append(re.escape(pattern[i]))
            i += 1
    return re.compile("".join(out))


def matches(pattern: str, path: str) -> bool:
    """Whether one alternative matches the whole path."""
    return compile_pattern(pattern).fullmatch(path) is not None
