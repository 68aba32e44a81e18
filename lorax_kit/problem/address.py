"""Problems by address, "module:object": so that commands and saved adapters can name a user's own."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from lorax_kit.core.specs.setting import shown
from lorax_kit.errors import StudyError
from lorax_kit.problem.problem import Problem

Builder = TypeVar("Builder", bound=Callable[..., Problem])
MARK = "__lorax_kit_builds_a_problem__"


def problem_builder(function: Builder) -> Builder:
    """Mark a function that builds an `lk.Problem`, so that an address may call it; what it builds remembers that.

    Addresses stand in configurations and in saved adapters, which come from anywhere: only what is marked is called. A
    function of a module (not of a script, nor inside another function) that is called with JSON data gives problems
    with the address "module:function", so that `lorax-kit` finds them from their adapters.

    Example:
      >>> @problem_builder
      ... def build(length: int = 32): ...
    """

    @wraps(function)
    def build(*args: Any, **keywords: Any) -> Problem:
        made = function(*args, **keywords)
        found = _address_of(function, args, keywords)
        if not isinstance(made, Problem) or found is None:
            return made
        address, settings = found
        return made.at(address, settings=settings)

    setattr(build, MARK, True)
    return cast(Builder, build)


def _address_of(
    function: Callable[..., Any], args: Sequence[Any], keywords: Mapping[str, Any]
) -> tuple[str, dict[str, Any]] | None:
    """The address of a call and its keywords; None where no later process could repeat it."""
    if function.__module__ == "__main__" or "<" in function.__qualname__:
        return None
    signature = inspect.signature(function)
    settings = {**dict(zip(signature.parameters, args, strict=False)), **keywords}
    try:
        read = json.loads(json.dumps(settings, allow_nan=False))
        same = signature.bind(**read).arguments == signature.bind(*args, **keywords).arguments
    except (TypeError, ValueError):  # not JSON data; or arguments without a name
        return None
    return (f"{function.__module__}:{function.__qualname__}", read) if same else None


def import_module_of(address: str) -> None:
    """Import the module of an address "module:object", as `problem_at` does: it may register methods.

    Raises:
      StudyError: it cannot be imported.
    """
    with _searched(False):
        try:
            importlib.import_module(address.partition(":")[0])
        except Exception as e:  # whatever a module raises as it runs
            raise _cannot_import(address, e) from None


def problem_at(address: str, settings: Mapping[str, Any] | None = None, *, remembered: bool = False) -> Problem:
    """The problem at an address; its facts and its adapters remember both.

    Args:
      address: "module:object", a `Problem` or a function marked by `lk.problem_builder`. The working directory is
        searched, too. Importing a module runs it.
      settings: keywords of the function; JSON data.
      remembered: the address comes from a saved adapter, and so from anywhere: the working directory, which may be the
        adapter's own, is not searched unless PYTHONPATH names it.

    Raises:
      StudyError: no such module or object, another kind of object, settings that it does not take.
    """
    module, _, path = address.partition(":") if isinstance(address, str) else ("", "", "")
    if not module or not path:
        raise StudyError(f"problem address {shown(address)} must be 'module:object'.")
    with _searched(remembered):
        try:
            target: Any = importlib.import_module(module)
            for part in path.split("."):
                target = getattr(target, part)
        except Exception as e:  # whatever a module raises as it runs
            hint = ""
            if remembered:
                hint = (
                    "\n  for addresses that adapters name the working directory is not searched, since both may come "
                    f"from anywhere: say that you trust it by --problem {address}"
                )
            raise _cannot_import(address, e, hint) from None
        made = _made(target, address, settings, remembered)
    own = {} if isinstance(target, Problem) else {"settings": dict(settings or {})}
    return made.at(address, **own)


def _cannot_import(address: str, error: Exception, hint: str = "") -> StudyError:
    return StudyError(f"the problem at {address!r} cannot be imported: {type(error).__name__}: {error}.{hint}")


@contextmanager
def _searched(remembered: bool) -> Iterator[None]:
    """Modules are looked for in the working directory, too, or, of a remembered address, nowhere near it."""
    before, here = list(sys.path), str(Path.cwd())
    said = here in [str(Path(p).absolute()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:] = [*before, here] if not remembered or said else [p for p in before if p not in ("", here)]
    try:
        yield
    finally:
        sys.path[:] = before


def _made(target: Any, address: str, settings: Mapping[str, Any] | None, remembered: bool) -> Problem:
    """The problem that an object of a module is, or builds."""
    if isinstance(target, Problem):
        if settings and not remembered:
            raise StudyError(f"{address!r} is a problem, which takes no settings; there are {', '.join(settings)}.")
        return target
    if callable(target) and getattr(target, MARK, False):
        try:
            inspect.signature(target).bind(**(settings or {}))
        except TypeError as e:
            raise StudyError(f"the problem at {address!r} does not take these settings: {e}.") from None
        made = target(**(settings or {}))
        if not isinstance(made, Problem):
            raise StudyError(f"{address!r} builds a {type(made).__name__}, and must build an lk.Problem.")
        return made
    raise StudyError(
        f"{address!r} is neither an lk.Problem nor a function marked to build one.\n  mark it: @lk.problem_builder"
    )
