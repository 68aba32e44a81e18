"""Where the base of a quantised weight comes from: it is restored for one product at a time, and again backward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
from jax import Array
from jax.tree_util import Partial

from lorax_kit.arrays.after import after
from lorax_kit.core.quantised import Quantised


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Source:
    """Where the base of a weight comes from when it is quantised, and what was done to it since."""

    quantised: Quantised
    steps: tuple[Partial, ...] = ()

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """Arrays, and nothing static."""
        return (self.quantised, self.steps), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any, ...]) -> Source:
        """Inverse of `tree_flatten`."""
        return cls(*children)

    def restore(self) -> Array:
        """The base in its current layout."""
        w = self.quantised.restore()
        for step in self.steps:
            w = step(w)
        return w


@jax.custom_vjp
def restored_product(fn: Partial, source: Source, x: Array) -> Array:
    """`fn(w, x)`, linear in x, with w restored for it alone, and once more for the gradients.

    The quantised base has none; what scaled or changed it since, and `x`, have theirs.
    """
    return _restored(fn, source, x)


def _restored(fn: Partial, source: Source, x: Array) -> Array:
    later: Source = after(x, source)
    product: Array = fn(later.restore(), x)
    return product


def _restored_fwd(fn: Partial, source: Source, x: Array) -> tuple[Array, tuple[Partial, Source, Array]]:
    # Not by the rule itself: gradients are differentiated forward, too.
    return _restored(fn, source, x), (fn, source, x)


def _restored_bwd(residuals: tuple[Partial, Source, Array], g: Array) -> tuple[Partial, Any, Array]:
    fn, source, x = residuals
    later: Source = after(g, source)

    def product(fn: Partial, steps: tuple[Partial, ...], x: Array) -> Array:
        return fn(replace(later, steps=steps).restore(), x)

    dfn, dsteps, dx = jax.vjp(product, fn, later.steps, x)[1](g)
    return dfn, Source(None, dsteps), dx  # type: ignore[arg-type]  # None: no gradient


restored_product.defvjp(_restored_fwd, _restored_bwd)
