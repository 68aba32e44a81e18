"""Installed versions against the ranges in the package's metadata, and JAX's parts against JAX's own."""

from __future__ import annotations

import operator
import platform
import re
from importlib.metadata import PackageNotFoundError, metadata, requires
from typing import Any, NamedTuple

from lorax_kit.doctor.problem import Problem
from lorax_kit.extras import EXTRAS, installed
from lorax_kit.version import __version__

_COMPARE = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_CLAUSE = re.compile(r"(<=|>=|==|!=|<|>)\s*(\d+(?:\.\d+)*)(\.\*)?")


class Requirement(NamedTuple):
    """A line of a package's metadata: the name, the versions, and the extra that needs it ("": each install)."""

    name: str
    supported: str
    extra: str


def requirements(package: str) -> list[Requirement]:
    """Read what a package needs; none of one that is not installed."""
    try:
        lines = requires(package) or []
    except PackageNotFoundError:
        return []
    read = []
    for line in lines:
        needed, _, marker = line.partition(";")
        name, _, supported = re.fullmatch(r"\s*([\w.-]+)\s*(\[[^\]]*\])?(.*)", needed).groups()  # type: ignore[union-attr]
        extra = re.search(r"extra == [\"']([^\"']+)", marker)
        read.append(Requirement(name, supported.strip(" ()"), extra[1] if extra else ""))
    return read


def fits(found: str, supported: str) -> bool:
    """Whether a version lies in a range; only the numbers of a release count.

    Example:
      >>> fits("0.10.2", ">=0.10,<0.12"), fits("0.12.0", ">=0.10,<0.12"), fits("0.10.2", "==0.10.*")
      (True, False, True)
    """
    release = _release(found)
    for sign, text, any_further in _CLAUSE.findall(supported):
        bound = _release(text)
        part = (release + (0,) * len(bound))[: len(bound)] if any_further else release
        if not _COMPARE[sign](_stripped(part), _stripped(bound)):
            return False
    return True


def _release(text: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(n) for n in numbers[0].split(".")) if numbers else ()


def _stripped(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Without zeros at the end: 0.10 is 0.10.0."""
    while numbers and numbers[-1] == 0:
        numbers = numbers[:-1]
    return numbers


def software() -> tuple[dict[str, Any], list[Problem]]:
    """{"python", "lorax_kit", "packages", "extras"}, and what of them is wrong."""
    ours = requirements("lorax_kit")
    problems = []
    if not ours:
        problems.append(
            Problem("lorax_kit is not installed, so the versions it supports are not known", "pip install -e .")
        )
    python, python_problems = _python()
    listed = [r for r in ours if not r.extra or r.name == "chex"] + _parts_of_jax()
    packages, package_problems = _packages(listed)
    extras, extra_problems = _extras([r for r in ours if r.extra])
    facts = {"lorax_kit": __version__, "python": python, "packages": packages, "extras": extras}
    return facts, [*problems, *python_problems, *package_problems, *extra_problems]


def _python() -> tuple[dict[str, Any], list[Problem]]:
    version = platform.python_version()
    supported = "" if installed("lorax_kit") is None else metadata("lorax_kit")["Requires-Python"] or ""
    fact = {"version": version, "supported": supported, "ok": fits(version, supported)}
    if fact["ok"]:
        return fact, []
    what = f"Python is {version}, and lorax_kit supports {supported}"
    return fact, [Problem(what, "make an environment of a supported Python: python3.13 -m venv .venv", fatal=True)]


def _parts_of_jax() -> list[Requirement]:
    """jaxlib, and the plugins for accelerators that are installed: JAX fits few versions of them."""
    parts = {r.name: r for r in requirements("jax") if r.extra and r.name.startswith("jax-") and installed(r.name)}
    return [*(r for r in requirements("jax") if r.name == "jaxlib" and not r.extra), *parts.values()]


def _packages(needed: list[Requirement]) -> tuple[dict[str, Any], list[Problem]]:
    """{name: {"version", "supported", "ok"}} of packages; those that only an extra needs may be missing."""
    facts, problems = {}, []
    for name, supported, extra in needed:
        version = installed(name)
        ok = fits(version, supported) if version else bool(extra)
        facts[name] = {"version": version, "supported": supported, "ok": ok}
        if not ok:
            by = "jax" if name.startswith("jax") and name != "jax" and name != "jaxtyping" else "lorax_kit"
            what = f"{name} is {version or 'not installed'}, and {by} needs {supported}"
            problems.append(Problem(what, f"pip install '{name}{supported}'", fatal=True))
    return facts, problems


def _extras(needed: list[Requirement]) -> tuple[dict[str, Any], list[Problem]]:
    """{extra: {"gives", "installed", "missing"}}; a missing extra is no problem, one that is too old is."""
    facts: dict[str, Any] = {}
    problems = []
    for name, supported, extra in needed:
        fact = facts.setdefault(extra, {"gives": EXTRAS.get(extra, ""), "installed": True, "missing": []})
        version = installed(name)
        if version is None:
            fact["installed"] = False
            fact["missing"].append(name)
        elif not fits(version, supported):
            what = f"{name} is {version}, and the extra {extra!r} ({fact['gives']}) needs {supported}"
            problems.append(Problem(what, f"pip install 'lorax_kit[{extra}]'"))
    return facts, problems
