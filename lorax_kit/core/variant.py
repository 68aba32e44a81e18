"""What a low-rank method is: two pure functions, kept in a table that `lorax_kit.variants` fills."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jax import Array

from lorax_kit.core.errors import SpecError
from lorax_kit.core.factors import Factors
from lorax_kit.core.plan import Site


class Variant(NamedTuple):
    """One method. The effective weight is column_scale * (W + s * delta), delta = a^T b.

    Attributes:
      init: (site, w, key) -> Factors with a zero update.
      column_scale: (site, w, factors, scale) -> (*stack, *out) multiplier of every output, or None: all ones.
    """

    init: Callable[[Site, Array, Array], Factors]
    column_scale: Callable[[Site, Array, Factors, Array | float], Array] | None = None


VARIANTS: dict[str, Variant] = {}


def variant(name: str) -> Variant:
    """Look a method up by name; unknown names raise `SpecError`."""
    if name not in VARIANTS:
        raise SpecError(f"variant {name!r} is unknown; choose from {', '.join(sorted(VARIANTS))}.")
    return VARIANTS[name]
