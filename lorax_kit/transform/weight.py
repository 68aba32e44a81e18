"""An adapted parameter on its way through the program: the base array beside its factors, never summed.

The factors are kept against the dimensions that `w` has *now*: each has a leading rank axis, then one axis per
dimension of `w`, of the same size where the factor varies with it and 1 where it does not, so that

    W' = gain * (w + scale * sum_r a[r] * b[r])        by broadcasting

A kernel (in, out) has a (r, in, 1) and b (r, 1, out); stacked axes (layers, experts) are full in both. Transposing,
slicing, reshaping or joining `w` is then the same operation on the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import Partial

from lorax_kit.arrays.after import after
from lorax_kit.arrays.dtypes import wide
from lorax_kit.arrays.placement import varies
from lorax_kit.core.lowrank import LowRank
from lorax_kit.core.method import Update
from lorax_kit.core.quantised import Quantised
from lorax_kit.core.site import Axes, Site
from lorax_kit.transform.source import Source, restored_product


class Part(NamedTuple):
    """One parameter within a weight (a joined weight has several).

    Attributes:
      path: of the parameter.
      shape: of the parameter.
      dims: the original axes that each current dimension holds.
      looked: original axes along which entries were looked up.
      altered: the operation, if any, after which its inputs may be others, or in another order (while being watched).
    """

    path: str
    shape: tuple[int, ...]
    dims: tuple[tuple[int, ...], ...]
    looked: tuple[int, ...] = ()
    altered: str = ""

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
      w: the base in its current layout and dtype; of a quantised one only its shape and dtype, and `base` restores it.
      a, b: (r, *d), each d the size of that dimension of `w` or 1; None while a plan is being resolved.
      gain: (*d) multiplier of inputs, outputs or both, in at least fp32, or None.
      scale: scalar.
      key: random key of the site's dropout; None where nothing is dropped.
      rate: () fp32, of that dropout.
      source: of a quantised base, from which `used` restores `w` once more in the backward pass.
      layer: which of its stacked matrices this is, () int32, where a scan reads them one by one while being watched.
      adapter: () int, of `adapters` whose rows `a` and `b` hold one after the other that whose rows count; else None.
      empty: the base is zero, and no product of it is formed.
      trained_in_full: only watched while a plan is being resolved, to see that it is used.
      adapters: how many adapters' rows there are.
    """

    parts: tuple[Part, ...]
    w: Array | jax.ShapeDtypeStruct
    a: Array | None = None
    b: Array | None = None
    gain: Array | None = None
    scale: Array | None = None
    key: Array | None = None
    rate: Array | None = None
    source: Source | None = None
    layer: Array | None = None
    adapter: Array | None = None
    empty: bool = False
    trained_in_full: bool = False
    adapters: int = 1

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arrays, and what is static."""
        w, later = (None, self.w) if isinstance(self.w, jax.ShapeDtypeStruct) else (self.w, None)
        arrays = (w, self.a, self.b, self.gain, self.scale, self.key, self.rate, self.source, self.layer, self.adapter)
        return arrays, (later, self.parts, self.empty, self.trained_in_full, self.adapters)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], arrays: tuple[Any, ...]) -> Weight:
        """Inverse of `tree_flatten`."""
        names = ("w", "a", "b", "gain", "scale", "key", "rate", "source", "layer", "adapter")
        later, *rest = static
        fixed: dict[str, Any] = dict(zip(("parts", "empty", "trained_in_full", "adapters"), rest, strict=True))
        named = dict(zip(names, arrays, strict=True))
        return cls(**(named if later is None else named | {"w": later}), **fixed)

    @property
    def probe(self) -> bool:
        """Whether a plan is being resolved, and there are no factors yet."""
        return self.a is None

    def base(self) -> Array:
        """`w` as an array: restored now, and held by nobody but the caller, where the base is quantised."""
        if isinstance(self.w, jax.ShapeDtypeStruct):
            assert self.source is not None
            return self.source.restore()
        return self.w

    @property
    def shape(self) -> tuple[int, ...]:
        """Of `w`."""
        return tuple(self.w.shape)

    def factors(self) -> tuple[Array, Array]:
        """(a, b) of a weight that is no probe."""
        assert self.a is not None
        assert self.b is not None
        return self.a, self.b

    def chosen(self, *operands: Any) -> Weight:
        """The weight with the rows of its own adapter alone, copied once a float array among the operands is there."""
        if self.adapter is None:
            return self
        arrays = (x for x in operands if isinstance(x, Array) and jnp.issubdtype(x.dtype, jnp.floating) and x.size)
        first = next(arrays, None)
        index = self.adapter if first is None else after(first, self.adapter)
        rows = self.factors()[0].shape[0] // self.adapters
        a, b = (lax.dynamic_slice_in_dim(x, index * rows, rows) for x in self.factors())
        return replace(self, a=a, b=b, adapter=None, adapters=1)

    def owned(self, factor: Array, lead: int = 1) -> frozenset[int]:
        """The dimensions of `w`, larger than 1, along which a factor varies."""
        return frozenset(d for d, n in enumerate(self.shape) if n > 1 and factor.shape[lead + d] == n)

    def sides(self, ins: Sequence[int], outs: Sequence[int], stack: Sequence[int] = ()) -> tuple[Array, Array] | None:
        """The factor that varies with `ins`, and the one with `outs`, both with `stack`; None if they lie otherwise."""
        a, b = self.factors()
        wide = [{d for d in (*dims, *stack) if self.shape[d] > 1} for dims in (ins, outs)]
        owned = [self.owned(a), self.owned(b)]
        return (a, b) if owned == wide else (b, a) if owned == wide[::-1] else None

    def rebased(self, base: Partial, **changes: Any) -> Weight:
        """The weight with `base` applied to `w`, and other changes. What `base` needs beside `w` it holds as leaves."""
        source = None if self.source is None else replace(self.source, steps=(*self.source.steps, base))
        w = jax.eval_shape(base, self.w) if isinstance(self.w, jax.ShapeDtypeStruct) else base(self.w)
        return replace(self, w=w, source=source, **changes)

    def used(self, fn: Partial, x: Array, kernel: str) -> Array:
        """`fn(w, x)`, a product of the base; of a quantised one by `restored_product`, but for the plain kernel."""
        if self.empty:
            shape = jax.eval_shape(fn, self.w, x)
            return jnp.zeros(shape.shape, shape.dtype)
        if self.source is None or kernel == "plain":
            return fn(self.base(), x)
        return restored_product(fn, self.source, x)

    def mapped(
        self,
        base: Partial,
        change: Callable[[Array, int], Array],
        dims: Callable[[Any], tuple[Any, ...]],
    ) -> Weight:
        """The weight after a change of layout.

        Args:
          base: the change of `w`.
          change: (array, lead) -> the same change of a factor (lead 1: behind its rank axis) or the gain (lead 0).
          dims: the same change of a tuple that has one entry per dimension.
        """
        parts = tuple(p._replace(dims=dims(p.dims)) for p in self.parts)
        if self.probe:
            return self.rebased(base, parts=parts)
        a, b = (change(x, 1) for x in self.factors())
        gain = None if self.gain is None else change(self.gain, 0)
        return self.rebased(base, parts=parts, a=a, b=b, gain=gain)

    def folded(self, axes: frozenset[str]) -> Weight:
        """The weight whose masks differ along axes of devices: those that hold other inputs draw other masks."""
        if self.key is None or not axes - varies(self.key):
            return self
        names = tuple(sorted(axes - varies(self.key)))
        return replace(self, key=jax.random.fold_in(self.key, lax.axis_index(names)))

    def dropped(self, x: Array) -> Array:
        """`x` as the low-rank path reads it: after inverted dropout, or as it is where the weight has no key."""
        if self.key is None:
            return x
        assert self.rate is not None
        kept = 1.0 - self.rate
        keep = jax.random.bernoulli(self.key, kept, x.shape)
        return jnp.where(keep, x / kept.astype(x.dtype), 0).astype(x.dtype)

    def update(self, dtype: Any) -> Array:
        """scale * sum_r a[r] * b[r], of the shape of `w` (or 1 along dimensions that neither factor varies with)."""
        a, b = self.factors()
        letters = "abcdefghijklmnopqrstuvwxy"
        names = [
            "Z" + "".join(letters[d] for d in range(self.w.ndim) if x.shape[1 + d] != 1 or self.shape[d] == 1)
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
            return self.base()
        if self.adapter is not None:
            return self.chosen().materialise()
        dtype = wide(self.factors()[0].dtype, self.w.dtype)
        total = self.base().astype(dtype) + self.update(dtype)
        if self.gain is not None:
            total = self.gain.astype(dtype) * total
        return total.astype(self.w.dtype)


def make_weight(
    site: Site,
    w: Array | jax.ShapeDtypeStruct,
    source: Source | None,
    update: Update,
    scale: Any,
    key: Array | None,
    rate: Any = 0.0,
) -> Weight:
    """The weight of a site, in the parameter's own layout.

    Args:
      w, source: the base; or its shape, and where it comes from if it is quantised.
      update: from the site's method; without rows it is a gain alone.
      scale: s.
      key: random key for dropout, or None.
      rate: of the dropout, where there is a key.
    """
    inputs, outputs = (*site.axes.stack, *site.axes.inputs), (*site.axes.stack, *site.axes.outputs)
    a, b = update.a, update.b
    if a is None or b is None:
        a, b = (jnp.zeros((0, *(site.shape[i] for i in axes)), jnp.float32) for axes in (inputs, outputs))
    gains = [
        _spread(gain, axes, 0, w.ndim)
        for gain, axes in ((update.out_gain, outputs), (update.in_gain, inputs))
        if gain is not None
    ]
    return Weight(
        parts=(whole(site.path, site.shape),),
        w=w,
        source=source,
        a=_spread(a, inputs, 1, w.ndim),
        b=_spread(b, outputs, 1, w.ndim),
        gain=reduce(jnp.multiply, gains) if gains else None,
        scale=jnp.asarray(scale, wide(a.dtype)),
        key=key,
        rate=None if key is None else jnp.asarray(rate, jnp.float32),
    )


def multiplied(x: Array, gain: Array) -> Array:
    """`x` times a gain that broadcasts against it: in at least fp32, rounded once into the dtype of `x`."""
    dtype = wide(x.dtype, gain.dtype)
    return (x.astype(dtype) * gain.astype(dtype)).astype(x.dtype)


def _spread(x: Array, axes: tuple[int, ...], lead: int, ndim: int) -> Array:
    """A factor or gain whose dimensions behind `lead` are these axes, against all axes of the parameter."""
    order = sorted(range(len(axes)), key=axes.__getitem__)
    if order != list(range(len(axes))):
        x = jnp.transpose(x, (*range(lead), *(lead + i for i in order)))
    return lax.expand_dims(x, tuple(lead + i for i in range(ndim) if i not in axes))


def lowrank_weight(path: str, leaf: LowRank) -> Weight:
    """A parameter that is a product: factors over an empty base, or over the residual."""
    ndim = len(leaf.shape)
    return Weight(
        parts=(whole(path, leaf.shape),),
        w=jnp.zeros(leaf.shape, leaf.dtype) if leaf.residual is None else leaf.residual,
        empty=leaf.residual is None,
        a=_spread(leaf.a, (*leaf.stack, *leaf.inputs), 1, ndim),
        b=_spread(leaf.b, (*leaf.stack, *leaf.outputs), 1, ndim),
        scale=jnp.ones((), jnp.float32),
    )


def frozen_weight(path: str, base: Quantised) -> Weight:
    """A quantised parameter that no site adapts: a weight of rank 0."""
    ndim = len(base.shape)
    last, rest = (1,) * (ndim - 1), base.shape[:-1]
    return Weight(
        parts=(whole(path, base.shape),),
        w=jax.ShapeDtypeStruct(base.shape, base.dtype),
        source=Source(base),
        a=jnp.zeros((0, *rest, 1), jnp.float32),
        b=jnp.zeros((0, *last, base.shape[-1]), jnp.float32),
        scale=jnp.ones((), jnp.float32),
    )


def whole(path: str, shape: tuple[int, ...]) -> Part:
    """A parameter that fills its weight."""
    return Part(path, shape, tuple((i,) for i in range(len(shape))))


def with_base(fn: Callable[[list[Any]], Array], args: Sequence[Any]) -> Partial:
    """`fn(args)` as a function of the base alone: what else is among the args becomes leaves."""
    here = [isinstance(x, Weight) for x in args]

    def run(*values: Any) -> Array:
        others = iter(values[:-1])
        return fn([values[-1] if base else next(others) for base in here])

    return Partial(run, *(x for x in args if not isinstance(x, Weight)))
