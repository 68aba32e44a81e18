"""An adapted parameter on its way through the program: the base array beside its factors, never summed.

The factors are kept against the dimensions that `w` has *now*: each has a leading rank axis, then one axis per
dimension of `w`, of the same size where the factor varies with it and 1 where it does not, so that

    W' = column * (w + scale * sum_r a[r] * b[r])        by broadcasting

A kernel (in, out) has a (r, in, 1) and b (r, 1, out); stacked axes (layers, experts) are full in both. Transposing,
slicing, reshaping or joining `w` is then the same operation on the factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.core.factors import Factors
from lorax_kit.core.plan import Axes, Site


class Part(NamedTuple):
    """One parameter within a weight (a joined weight has several).

    Attributes:
      path: of the parameter.
      shape: of the parameter.
      dims: the original axes that each current dimension holds.
      looked: original axes along which entries were looked up.
      dropout: rate of the site.
    """

    path: str
    shape: tuple[int, ...]
    dims: tuple[tuple[int, ...], ...]
    looked: tuple[int, ...] = ()
    dropout: float = 0.0

    def axes(self, contracted: tuple[int, ...], free: tuple[int, ...]) -> Axes | None:
        """What a product over these dimensions makes of the parameter's axes; None if it splits one of them.

        Axes that are neither contracted nor free (batched, scanned, indexed) are stacked.
        """
        ins, outs = ({i for d in dims for i in self.dims[d]} for dims in (contracted, free))
        if ins & outs or not ins or not outs:
            return None
        stack = set(range(len(self.shape))) - ins - outs
        return Axes(inputs=tuple(sorted(ins)), outputs=tuple(sorted(outs)), stack=tuple(sorted(stack)))

    def as_table(self) -> Axes | None:
        """The axes of a table whose looked-up slices are not multiplied: an embedding of more than one axis."""
        rest = tuple(i for i in range(len(self.shape)) if i not in self.looked)
        return Axes(inputs=self.looked, outputs=rest) if self.looked and rest else None


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, kw_only=True)
class Weight:
    """Base and factors of one site, or of several joined.

    Attributes:
      parts: whose they are.
      w: the base in its current layout and dtype.
      a, b: (r, *d), each d the size of that dimension of `w` or 1; None while a plan is being resolved.
      column: (*d) multiplier (DoRA), or None.
      scale: scalar.
      key: random key of the site's dropout; None where nothing is dropped.
      trained_in_full: only watched while a plan is being resolved, to see that it is used.
    """

    parts: tuple[Part, ...]
    w: Array
    a: Array | None = None
    b: Array | None = None
    column: Array | None = None
    scale: Array | None = None
    key: Array | None = None
    trained_in_full: bool = False

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arrays, and what is static."""
        return (self.w, self.a, self.b, self.column, self.scale, self.key), (self.parts, self.trained_in_full)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], arrays: tuple[Any, ...]) -> Weight:
        """Inverse of `tree_flatten`."""
        w, a, b, column, scale, key = arrays
        parts, watched = static
        return cls(parts=parts, w=w, a=a, b=b, column=column, scale=scale, key=key, trained_in_full=watched)

    @property
    def probe(self) -> bool:
        """Whether a plan is being resolved, and there are no factors yet."""
        return self.a is None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of `w`."""
        return tuple(self.w.shape)

    def factors(self) -> tuple[Array, Array]:
        """(a, b) of a weight that is no probe."""
        assert self.a is not None
        assert self.b is not None
        return self.a, self.b

    def owned(self, factor: Array, lead: int = 1) -> frozenset[int]:
        """The dimensions of `w`, larger than 1, along which a factor varies."""
        return frozenset(d for d, n in enumerate(self.shape) if n > 1 and factor.shape[lead + d] == n)

    def mapped(self, w: Array, change: Callable[[Array, int], Array], dims: Callable[[Any], tuple[Any, ...]]) -> Weight:
        """The weight after a change of layout.

        Args:
          w: the base, changed.
          change: (array, lead) -> the same change of a factor (lead 1: behind its rank axis) or the column (lead 0).
          dims: the same change of a tuple that has one entry per dimension.
        """
        parts = tuple(p._replace(dims=dims(p.dims)) for p in self.parts)
        if self.probe:
            return replace(self, w=w, parts=parts)
        a, b = (change(x, 1) for x in self.factors())
        column = None if self.column is None else change(self.column, 0)
        return replace(self, w=w, parts=parts, a=a, b=b, column=column)

    def update(self, dtype: Any) -> Array:
        """scale * sum_r a[r] * b[r], of the shape of `w` (or 1 along dimensions that neither factor varies with)."""
        a, b = self.factors()
        letters = "abcdefghijklmnopqrstuvwxy"
        names = [
            "Z" + "".join(letters[d] for d in range(self.w.ndim) if x.shape[1 + d] > 1 or self.shape[d] == 1)
            for x in (a, b)
        ]
        both = "".join(letters[d] for d in range(self.w.ndim) if any(letters[d] in n for n in names))
        kept = [
            x.reshape(x.shape[0], *(x.shape[1 + d] for d in range(self.w.ndim) if letters[d] in n))
            for x, n in zip((a, b), names, strict=True)
        ]
        summed = jnp.einsum(f"{names[0]},{names[1]}->{both}", *(x.astype(dtype) for x in kept))
        spread = tuple(n if letters[d] in both else 1 for d, n in enumerate(self.shape))
        return jnp.asarray(self.scale, dtype) * summed.reshape(spread)

    def materialise(self) -> Array:
        """The whole sum in the current layout and dtype: what an unknown operation is given."""
        if self.probe:
            return self.w
        dtype = jnp.promote_types(self.factors()[0].dtype, self.w.dtype)
        total = self.w.astype(dtype) + self.update(dtype)
        if self.column is not None:
            total = self.column.astype(dtype) * total
        return total.astype(self.w.dtype)


def make_weight(site: Site, w: Array, factors: Factors, column: Array | None, scale: Any, key: Array | None) -> Weight:
    """The weight of a site, in the parameter's own layout.

    Args:
      column: (*stack, *out), or None.
      scale: replaces the site's.
      key: random key for dropout, or None.
    """

    def spread(x: Array, axes: tuple[int, ...], lead: int) -> Array:
        order = sorted(range(len(axes)), key=axes.__getitem__)
        x = jnp.transpose(x, (*range(lead), *(lead + i for i in order)))
        return jnp.expand_dims(x, tuple(lead + i for i in range(len(site.shape)) if i not in axes))

    stack = site.axes.stack
    return Weight(
        parts=(whole(site.path, site.shape, dropout=site.setting.dropout),),
        w=w,
        a=spread(factors.a, (*stack, *site.axes.inputs), 1),
        b=spread(factors.b, (*stack, *site.axes.outputs), 1),
        column=None if column is None else spread(column, (*stack, *site.axes.outputs), 0),
        scale=jnp.asarray(scale, jnp.float32),
        key=key,
    )


def whole(path: str, shape: tuple[int, ...], dropout: float = 0.0) -> Part:
    """A parameter that fills its weight."""
    return Part(path, shape, tuple((i,) for i in range(len(shape))), dropout=dropout)
