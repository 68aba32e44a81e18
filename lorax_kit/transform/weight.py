"""An adapted parameter on its way through the program: the base array beside its factors, never summed.

The factors are kept against the dimensions that the base w has *now*: each has a leading rank axis, then one axis per
dimension of w, of the same size where the factor varies with it and 1 where it does not, so that

    W' = gain * (w + scale * sum_r a[r] * b[r])        by broadcasting

A kernel (in, out) has a (r, in, 1) and b (r, 1, out); stacked axes (layers, experts) are full in both. Transposing,
slicing, reshaping or joining w is then the same operation on the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, NamedTuple, Self

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
from lorax_kit.transform.base import Base, Dense, Empty, base_of


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


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter, or several joined, on its way through the program: a `Probe` or a `Weight`.

    Rules of layout are written once, for both: a layout changes the base and whatever arrays lie against it.

    Attributes:
      parts: whose it is.
      base: the frozen parameter, in its current layout and dtype.
    """

    parts: tuple[Part, ...] = field(metadata={"static": True})
    base: Base

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """Of the base."""
        return len(self.base.shape)

    def arrays(self) -> dict[str, tuple[Array, int]]:
        """What lies against the base: field -> (array, how many axes it has before those of the base)."""
        return {}

    def owned(self, x: Array, lead: int = 1) -> frozenset[int]:
        """The dimensions of the base, larger than 1, along which a factor (lead 1) or a gain (lead 0) varies."""
        return frozenset(d for d, n in enumerate(self.shape) if n > 1 and x.shape[lead + d] == n)

    def rebased(self, fn: Partial, **changes: Any) -> Self:
        """The same with `fn` applied to the base, and other changes."""
        return replace(self, base=self.base.changed(fn), **changes)

    def arranged(self, change: Callable[[Array, int], Array], dims: Callable[[Any], tuple[Any, ...]]) -> Self:
        """The same after a change of layout, but for the base.

        Args:
          change: (array, lead) -> that change of a factor (lead 1: behind its rank axis) or the gain (lead 0).
          dims: that change of a tuple that has one entry per dimension.
        """
        parts = tuple(p._replace(dims=dims(p.dims)) for p in self.parts)
        arrays: dict[str, Any] = {name: change(x, lead) for name, (x, lead) in self.arrays().items()}
        return replace(self, parts=parts, **arrays)

    def mapped(
        self, base: Partial, change: Callable[[Array, int], Array], dims: Callable[[Any], tuple[Any, ...]]
    ) -> Self:
        """The same after a change of layout: `base` is that of the base, and see `arranged`."""
        return self.arranged(change, dims).rebased(base)

    def materialise(self) -> Array:
        """The whole in the current layout and dtype: what an unknown operation is given."""
        return self.base.array()


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Probe(Parameter):
    """A parameter that is watched, to see how the program uses it; it has no factors yet.

    Attributes:
      layer: which of its stacked matrices this is, () int32, where a scan reads them one by one.
      full: whether it is trained in full, and only watched for being used at all.
    """

    layer: Array | None = None
    full: bool = field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Weight(Parameter):
    """Base and factors of one site, or of several joined.

    Attributes:
      a, b: (r, *d), each d the size of that dimension of the base or 1.
      gain: (*d) multiplier of inputs, outputs or both, in at least fp32, or None.
      scale: scalar.
      key: random key of the site's dropout; None where nothing is dropped.
      rate: () fp32, of that dropout.
      adapter: () int, of `adapters` whose rows `a` and `b` hold one after the other that whose rows count; else None.
      adapters: how many adapters' rows there are.
    """

    a: Array
    b: Array
    gain: Array | None = None
    scale: Array
    key: Array | None = None
    rate: Array | None = None
    adapter: Array | None = None
    adapters: int = field(default=1, metadata={"static": True})

    def arrays(self) -> dict[str, tuple[Array, int]]:
        """See `Parameter.arrays`: the factors, and the gain if there is one."""
        factors = {"a": (self.a, 1), "b": (self.b, 1)}
        return factors if self.gain is None else {**factors, "gain": (self.gain, 0)}

    def chosen(self, *operands: Any) -> Weight:
        """The weight with the rows of its own adapter alone, copied once a float array among the operands is there."""
        if self.adapter is None:
            return self
        arrays = (x for x in operands if isinstance(x, Array) and jnp.issubdtype(x.dtype, jnp.floating) and x.size)
        first = next(arrays, None)
        index = self.adapter if first is None else after(first, self.adapter)
        rows = self.a.shape[0] // self.adapters
        a, b = (lax.dynamic_slice_in_dim(x, index * rows, rows) for x in (self.a, self.b))
        return replace(self, a=a, b=b, adapter=None, adapters=1)

    def sides(self, ins: Sequence[int], outs: Sequence[int], stack: Sequence[int] = ()) -> tuple[Array, Array] | None:
        """The factor that varies with `ins`, and the one with `outs`, both with `stack`; None if they lie otherwise."""
        wide = [{d for d in (*dims, *stack) if self.shape[d] > 1} for dims in (ins, outs)]
        owned = [self.owned(self.a), self.owned(self.b)]
        return (self.a, self.b) if owned == wide else (self.b, self.a) if owned == wide[::-1] else None

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
        """scale * sum_r a[r] * b[r], of the base's shape (or 1 along dimensions that neither factor varies with)."""
        letters = "abcdefghijklmnopqrstuvwxy"
        names = [
            "Z" + "".join(letters[d] for d in range(self.ndim) if x.shape[1 + d] != 1 or self.shape[d] == 1)
            for x in (self.a, self.b)
        ]
        both = "".join(letters[d] for d in range(self.ndim) if any(letters[d] in n for n in names))
        kept = [
            x.reshape(x.shape[0], *(x.shape[1 + d] for d in range(self.ndim) if letters[d] in n))
            for x, n in zip((self.a, self.b), names, strict=True)
        ]
        summed = jnp.einsum(f"{names[0]},{names[1]}->{both}", *(x.astype(dtype) for x in kept))
        spread = tuple(n if letters[d] in both else 1 for d, n in enumerate(self.shape))
        return jnp.asarray(self.scale, dtype) * summed.reshape(spread)

    def materialise(self) -> Array:
        """See `Parameter.materialise`: the whole sum."""
        if self.adapter is not None:
            return self.chosen().materialise()
        dtype = wide(self.a.dtype, self.base.dtype)
        total = self.base.array().astype(dtype) + self.update(dtype)
        if self.gain is not None:
            total = self.gain.astype(dtype) * total
        return total.astype(self.base.dtype)


def make_weight(site: Site, base: Base, update: Update, scale: Any, key: Array | None, rate: Any = 0.0) -> Weight:
    """The weight of a site, in the parameter's own layout.

    Args:
      base: the parameter itself.
      update: from the site's method; without rows it is a gain alone.
      scale: s.
      key: random key for dropout, or None.
      rate: of the dropout, where there is a key.
    """
    inputs, outputs = (*site.axes.stack, *site.axes.inputs), (*site.axes.stack, *site.axes.outputs)
    a, b = update.a, update.b
    if a is None or b is None:
        a, b = (jnp.zeros((0, *(site.shape[i] for i in axes)), jnp.float32) for axes in (inputs, outputs))
    ndim = len(site.shape)
    gains = [
        _spread(gain, axes, 0, ndim)
        for gain, axes in ((update.out_gain, outputs), (update.in_gain, inputs))
        if gain is not None
    ]
    return Weight(
        parts=(whole(site.path, site.shape),),
        base=base,
        a=_spread(a, inputs, 1, ndim),
        b=_spread(b, outputs, 1, ndim),
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
        base=Empty(jnp.zeros(leaf.shape, leaf.dtype)) if leaf.residual is None else Dense(leaf.residual),
        a=_spread(leaf.a, (*leaf.stack, *leaf.inputs), 1, ndim),
        b=_spread(leaf.b, (*leaf.stack, *leaf.outputs), 1, ndim),
        scale=jnp.ones((), jnp.float32),
    )


def frozen_weights(named: Mapping[str, Any], adapted: Collection[str] = ()) -> dict[str, Weight]:
    """The quantised parameters that no site adapts: weights of rank 0."""
    return {
        path: Weight(
            parts=(whole(path, leaf.shape),),
            base=base_of(leaf),
            a=jnp.zeros((0, *leaf.shape[:-1], 1), jnp.float32),
            b=jnp.zeros((0, *(1,) * (leaf.ndim - 1), leaf.shape[-1]), jnp.float32),
            scale=jnp.ones((), jnp.float32),
        )
        for path, leaf in named.items()
        if isinstance(leaf, Quantised) and path not in adapted
    }


def whole(path: str, shape: tuple[int, ...]) -> Part:
    """A parameter that fills its weight."""
    return Part(path, shape, tuple((i,) for i in range(len(shape))))


def with_base(fn: Callable[[list[Any]], Array], args: Sequence[Any]) -> Partial:
    """`fn(args)` as a function of the base alone: what else is among the args becomes leaves."""
    here = [isinstance(x, Parameter) for x in args]

    def run(*values: Any) -> Array:
        others = iter(values[:-1])
        return fn([values[-1] if base else next(others) for base in here])

    return Partial(run, *(x for x in args if not isinstance(x, Parameter)))
