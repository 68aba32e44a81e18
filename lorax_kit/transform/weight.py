"""An adapted parameter on its way through the program: the base array beside its factors, never summed.

A `Weight` is a pytree, so it passes through `scan`, `checkpoint` and `jit` as it is. It remembers which of
the parameter's original axes each of its current dimensions is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.core.plan import Site


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, kw_only=True)
class Weight:
    """Base and factors of one site.

    Attributes:
      path: of the parameter.
      axes: the original axis of each current dimension of `w`.
      site: None while a plan is being resolved; the factors below are None then, too.
      stack: stacked axes not yet consumed by a scan.
      w: the base in its current layout and dtype.
      a, b: (r, *stack, *in), (r, *stack, *out), in original axis order whatever the layout of `w`.
      column: (*stack, *out) multiplier of the outputs (DoRA), or None.
      scale: scalar.
      key: random key of the site's dropout, or None.
    """

    path: str
    axes: tuple[int, ...]
    w: Array
    site: Site | None = None
    stack: tuple[int, ...] = ()
    a: Array | None = None
    b: Array | None = None
    column: Array | None = None
    scale: Array | None = None
    key: Array | None = None

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arrays, and what is static."""
        return (self.w, self.a, self.b, self.column, self.scale, self.key), (
            self.path,
            self.axes,
            self.site,
            self.stack,
        )

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], arrays: tuple[Any, ...]) -> Weight:
        """Inverse of `tree_flatten`."""
        path, axes, site, stack = static
        w, a, b, column, scale, key = arrays
        return cls(path=path, axes=axes, site=site, stack=stack, w=w, a=a, b=b, column=column, scale=scale, key=key)

    def materialise(self) -> Array:
        """column * (W + s A^T B) in the current layout and dtype: what an unknown operation is given."""
        if self.site is None:
            return self.w
        assert self.a is not None
        assert self.b is not None
        site_axes = self.site.axes
        name = {axis: chr(ord("a") + axis) for axis in self.axes}
        rows = [name[i] for i in self.stack]
        a_axes = "".join(["Z", *rows, *(name[i] for i in site_axes.inputs)])
        b_axes = "".join(["Z", *rows, *(name[i] for i in site_axes.outputs)])
        layout = "".join(name[i] for i in self.axes)
        dtype = jnp.promote_types(self.a.dtype, self.w.dtype)
        update = jnp.einsum(f"{a_axes},{b_axes}->{layout}", self.a.astype(dtype), self.b.astype(dtype))
        total = self.w.astype(dtype) + jnp.asarray(self.scale, dtype) * update
        if self.column is not None:
            order = (*self.stack, *site_axes.outputs)
            kept = [i for i in self.axes if i in order]
            column = jnp.transpose(self.column, tuple(order.index(i) for i in kept))
            spread = tuple(d for d, i in enumerate(self.axes) if i not in order)
            total = jnp.expand_dims(column, spread).astype(dtype) * total
        return total.astype(self.w.dtype)
