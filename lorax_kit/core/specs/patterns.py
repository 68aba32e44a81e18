"""Path patterns: globs with `*`, `?`, `**`, `{a,b}` and `{0..5}`; or a regular expression after the prefix `re:`.

`*` and `?` stay within one name, `**` spans any number of names. A brace is spelled out into its alternatives, a range
of numbers (both ends included) into each of them, and each alternative must match on its own: `{query,valeu}` is an
error, not half a match.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice

from lorax_kit.errors import SpecError

REGEX_PREFIX = "re:"
_RANGE = re.compile(r"(\d{1,4})\.\.(\d{1,4})")
_TOKENS = re.compile(r"\*\*/|\*\*|.", re.DOTALL)
MOST_BRACES, MOST_ALTERNATIVES = 100, 10_000
FEW = 4
"""Wildcards in a pattern that a regular expression matches; with more of them it may try their places for ever."""


def expand_braces(pattern: str) -> tuple[str, ...]:
    """Spell out `{a,b}` (nesting allowed) and `{0..2}`: `x/{a,b}` -> `("x/a", "x/b")`.

    Raises:
      SpecError: braces that do not fit, more than 100 of them, or more than 10,000 alternatives.
    """
    if pattern.startswith(REGEX_PREFIX):
        return (pattern,)
    if (count := pattern.count("{")) > MOST_BRACES:
        raise SpecError(f"pattern {shortened(pattern)} has {count:,} braces; {MOST_BRACES} are the most.")
    alternatives = tuple(islice(_alternatives(pattern), MOST_ALTERNATIVES + 1))
    if len(alternatives) > MOST_ALTERNATIVES:
        raise SpecError(
            f"pattern {shortened(pattern)} stands for more than {MOST_ALTERNATIVES:,} alternatives.\n"
            "  each of them must match: write * where any name may stand"
        )
    return alternatives


def check_pattern(pattern: str) -> None:
    """Raise `SpecError` where a pattern is malformed."""
    if pattern.startswith(REGEX_PREFIX):
        compile_pattern(pattern)
    else:
        expand_braces(pattern)


def shortened(pattern: str) -> str:
    """A pattern within a line of a message."""
    return repr(pattern) if len(pattern) <= 80 else f"{pattern[:80]!r}..."


def _alternatives(pattern: str) -> Iterator[str]:
    start = pattern.find("{")
    if start < 0:
        if "}" in pattern:
            raise SpecError(f"pattern {pattern!r}: '}}' without '{{'.")
        yield pattern
        return
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
            for spelled in (x for part in parts for x in _numbers(part, pattern)):
                yield from _alternatives(head + spelled + tail)
            return
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
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # "[[": a later Python may read it otherwise
                return re.compile(pattern[len(REGEX_PREFIX) :])
        except FutureWarning as e:
            how = "put a backslash before [, &, |, ~ and - that stand for themselves within a set"
            raise SpecError(f"pattern {shortened(pattern)} is ambiguous: {e}.\n  {how}") from None
        except (re.error, OverflowError, RecursionError) as e:  # numbers and groups beyond what Python takes
            raise SpecError(f"pattern {shortened(pattern)} is not a regular expression: {e}.") from None
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
    return re.compile("".join(out), re.DOTALL)


def matches(pattern: str, path: str) -> bool:
    """Whether one alternative matches the whole path."""
    regex, wildcards = pattern.startswith(REGEX_PREFIX), pattern.count("*") + pattern.count("?")
    if not regex and not wildcards:
        return pattern == path
    if not regex and wildcards > FEW:
        return _matches_stepwise(pattern, path)
    return compile_pattern(pattern).fullmatch(path) is not None


def _matches_stepwise(pattern: str, path: str) -> bool:
    """`matches` of a glob, as the set of places in the path that its tokens reach one after the other."""
    places, size = {0}, len(path)
    for token in _TOKENS.findall(pattern):
        if token == "**":
            places = set(range(min(places), size + 1))
        elif token in ("*", "**/"):
            reached: set[int] = set()
            for at in places:
                while at not in reached:
                    reached.add(at)
                    end = path.find("/", at)
                    if token == "*" and at < size and at != end:
                        at += 1
                    elif token == "**/" and end > at:
                        at = end + 1
            places = reached
        elif token == "?":
            places = {at + 1 for at in places if at < size and path[at] != "/"}
        else:
            places = {at + 1 for at in places if path.startswith(token, at)}
        if not places:
            return False
    return size in places
