"""The base of a parameter on its way through the program: an array, zeros, or codes that each product restores anew.

All three know the same few things: to change their layout, to be multiplied, to be looked up, to be cut into layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import Partial

from lorax_kit.arrays.after import after
from lorax_kit.core.lowrank import dense
from lorax_kit.core.quantised import Quantised


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense:
    """A base that is there as an array, in its current layout and dtype."""

    w: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of `w`."""
        return tuple(self.w.shape)

    @property
    def dtype(self) -> Any:
        """Of `w`."""
        return self.w.dtype

    def array(self) -> Array:
        """The base as an array."""
        return self.w

    def changed(self, fn: Partial) -> Self:
        """The base after `fn`. What `fn` needs beside the array it holds as leaves."""
        return type(self)(fn(self.w))

    def dot(self, fn: Partial, x: Array, kernel: str) -> Array:
        """`fn(w, x)`, a product, where `kernel` is wanted."""
        product: Array = fn(self.w, x)
        return product

    def entries(self, take: Partial, axis: int, at: Array | None, fill: Any) -> Dense:
        """The slices that a lookup takes along an axis.

        Args:
          take: array -> slices; it may be thinner than the base, but for `axis`.
          at: (*) int, their places along the axis, where `take` gives (*at.shape, *rest); None where it does not.
          fill: what slices out of bounds hold; None: they are clipped.
        """
        return self.changed(take)

    def layers(self) -> tuple[Base | None, Base | None]:
        """What a scan over the leading dimension cuts, and what every step is given; one of them is None."""
        return self, None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Empty(Dense):
    """A base of zeros, of which no product is formed."""

    def dot(self, fn: Partial, x: Array, kernel: str) -> Array:
        """See `Dense.dot`: zeros."""
        shape = jax.eval_shape(fn, self.w, x)
        return jnp.zeros(shape.shape, shape.dtype)

    def entries(self, take: Partial, axis: int, at: Array | None, fill: Any) -> Dense:
        """See `Dense.entries`: zeros, or what fills, which products must see; from a table of one column."""
        thin = tuple(n if d == axis else 1 for d, n in enumerate(self.shape))
        taken = take(lax.slice(self.w, (0,) * self.w.ndim, thin))
        kind = Empty if fill is None else Dense
        return kind(jnp.broadcast_to(taken, jax.eval_shape(take, self.w).shape))

    def layers(self) -> tuple[Base | None, Base | None]:
        """See `Dense.layers`: an array of zeros for all layers would take their memory."""
        return None, Empty(self.w[0])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Restored:
    """A quantised base, and what was done to it since: restored for one product at a time, and again backward."""

    quantised: Quantised
    steps: tuple[Partial, ...] = ()
    shape: tuple[int, ...] = field(metadata={"static": True}, kw_only=True)
    dtype: Any = field(metadata={"static": True}, kw_only=True)

    def array(self) -> Array:
        """The base as an array: restored now, and held by nobody but the caller."""
        w = self.quantised.restore()
        for step in self.steps:
            w = step(w)
        return w

    def changed(self, fn: Partial) -> Restored:
        """See `Dense.changed`."""
        like = jax.eval_shape(fn, jax.ShapeDtypeStruct(self.shape, self.dtype))
        return replace(self, steps=(*self.steps, fn), shape=tuple(like.shape), dtype=like.dtype)

    def dot(self, fn: Partial, x: Array, kernel: str) -> Array:
        """See `Dense.dot`; the plain kernel leaves derivatives to autodiff."""
        product: Array = fn(self.array(), x) if kernel == "plain" else restored_product(fn, self, x)
        return product

    def entries(self, take: Partial, axis: int, at: Array | None, fill: Any) -> Base:
        """See `Dense.entries`; of a table only the rows looked up are restored."""
        if self.steps or axis != 0 or len(self.shape) != 2 or at is None:
            return self.changed(take)
        rows = self.quantised.rows(at)
        if fill is not None:
            inside = (at >= 0) & (at < self.shape[0])
            rows = jnp.where(inside[..., None], rows, jnp.asarray(fill, rows.dtype))
        return Dense(rows)

    def layers(self) -> tuple[Base | None, Base | None]:
        """See `Dense.layers`; each layer is restored in its own step."""
        if self.steps or len(self.shape) < 3:
            return Dense(self.array()), None
        shape = self.shape[1:]
        return replace(self, quantised=replace(self.quantised, shape=shape), shape=shape), None


Base = Dense | Restored


def base_of(leaf: Any) -> Base:
    """The base that a leaf of the params is: an array, or `Quantised`."""
    return Restored(leaf, shape=leaf.shape, dtype=leaf.dtype) if isinstance(leaf, Quantised) else Dense(dense(leaf))


def combined(w: Array, bases: Sequence[Any]) -> Dense:
    """The base that was formed of several bases and arrays: empty if all were."""
    return Empty(w) if all(isinstance(x, Empty) for x in bases) else Dense(w)


@jax.custom_vjp
def restored_product(fn: Partial, base: Restored, x: Array) -> Array:
    """`fn(w, x)`, linear in x, with w restored for it alone, and once more for the gradients.

    The quantised base has none; what scaled or changed it since, and `x`, have theirs.
    """
    return _restored(fn, base, x)


def _restored(fn: Partial, base: Restored, x: Array) -> Array:
    later: Restored = after(x, base)
    product: Array = fn(later.array(), x)
    return product


def _restored_fwd(fn: Partial, base: Restored, x: Array) -> tuple[Array, tuple[Partial, Restored, Array]]:
    # Not by the rule itself: gradients are differentiated forward, too.
    return _restored(fn, base, x), (fn, base, x)


def _restored_bwd(residuals: tuple[Partial, Restored, Array], g: Array) -> tuple[Partial, Any, Array]:
    fn, base, x = residuals
    later: Restored = after(g, base)

    def product(fn: Partial, steps: tuple[Partial, ...], x: Array) -> Array:
        return fn(replace(later, steps=steps).array(), x)

    dfn, dsteps, dx = jax.vjp(product, fn, later.steps, x)[1](g)
    return dfn, replace(base, quantised=None, steps=dsteps), dx  # type: ignore[arg-type]  # None: no gradient


restored_product.defvjp(_restored_fwd, _restored_bwd)
