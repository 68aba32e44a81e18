"""What a start is: a function of a site that gives its first factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jax import Array

from lorax_kit.core.method import Hints
from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import shown
from lorax_kit.errors import SpecError


class Start(NamedTuple):
    """The first factors of a site, in at least fp32.

    Attributes:
      a: (r, *stack, *in), or None for zeros.
      b: (r, *stack, *out), or None for zeros. Where both are given the update they make is taken off again, so that
        the base stays as it is: `methods.lora` says how.
    """

    a: Array | None
    b: Array | None


STARTS: dict[str, Callable[[Site, Array, Array, Hints], Start]] = {}
"""Name -> (site, w, key, hints) -> Start; `lorax_kit.starts` fills it. The key is the site's own."""

OLDER = {"kaiming_uniform": "kaiming"}


def start_of(name: object) -> str:
    """The name of a start as this version has it; unknown ones raise `SpecError`."""
    known = OLDER.get(name, name) if isinstance(name, str) else name
    if not isinstance(known, str) or known not in STARTS:
        raise SpecError(f"start is {shown(name)}; choose from {', '.join(STARTS)}.")
    return known
