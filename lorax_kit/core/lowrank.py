"""One parameter as a product of two factors, plus a residual: `LowRank`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.arrays.dtypes import wide


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, kw_only=True)
class LowRank:
    """One parameter as a^T b, plus a residual if there is one. Its arrays are params of their own: they may be trained.

    Attributes:
      a: (r, *stack, *in); each of the arrays may be `Quantised`.
      b: (r, *stack, *out).
      residual: what the product leaves, (*shape); None for nothing.
      shape, dtype: of the parameter.
      inputs, outputs, stack: its axes that `a` has, that `b` has, and that both have.
    """

    a: Any
    b: Any
    residual: Any = None
    shape: tuple[int, ...]
    dtype: Any
    inputs: tuple[int, ...] = (0,)
    outputs: tuple[int, ...] = (1,)
    stack: tuple[int, ...] = ()

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arrays by name, and what is static."""
        names = ("a", "b", "residual")
        arrays = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names)
        return arrays, (self.shape, self.dtype, self.inputs, self.outputs, self.stack)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], arrays: tuple[Any, ...]) -> LowRank:
        """Inverse of `tree_flatten_with_keys`."""
        names = ("a", "b", "residual", "shape", "dtype", "inputs", "outputs", "stack")
        return cls(**dict(zip(names, (*arrays, *static), strict=True)))

    def __repr__(self) -> str:
        """Without the entries."""
        rest = "" if self.residual is None else ", with a residual"
        return f"LowRank(rank={jnp.shape(self.a)[0]}, shape={self.shape}, dtype={self.dtype}{rest})"

    @property
    def rank(self) -> int:
        """Rows of the factors."""
        return int(self.a.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def restore(self) -> Array:
        """The parameter, (*shape) in `dtype`, summed in at least fp32."""
        dtype = wide(self.a.dtype)
        total = outer(dense(self.a), dense(self.b), self.inputs, self.outputs, self.stack, dtype)
        if self.residual is not None:
            total = total + dense(self.residual).astype(dtype)
        return total.astype(self.dtype)


def outer(
    a: Array, b: Array, inputs: tuple[int, ...], outputs: tuple[int, ...], stack: tuple[int, ...], dtype: Any
) -> Array:
    """a^T b, summed over the rank, in the layout of the parameter whose axes these are."""
    letters = {axis: chr(ord("a") + axis) for axis in (*stack, *inputs, *outputs)}
    one, two = ("".join(letters[i] for i in (*stack, *axes)) for axes in (inputs, outputs))
    layout = "".join(letters[i] for i in sorted(letters))
    factors = (x.astype(dtype) for x in (a, b))
    return jnp.einsum(f"Z{one},Z{two}->{layout}", *factors, precision=jax.lax.Precision.HIGHEST)


def identity_rows(whole: Array) -> tuple[Array, Array]:
    """Rows a (r, S, K) and b (r, S, N) of any matrices (S, K, N), exactly: r = min(K, N), an identity on that side.

    Example:
      >>> a, b = identity_rows(jnp.ones((4, 3, 2)))
      >>> a.shape, b.shape
      ((2, 4, 3), (2, 4, 2))
    """
    stack, ins, outs = whole.shape
    n = min(ins, outs)
    eye = jnp.broadcast_to(jnp.eye(n, dtype=whole.dtype)[:, None], (n, stack, n))
    return (eye, jnp.moveaxis(whole, 1, 0)) if ins <= outs else (jnp.moveaxis(whole, 2, 0), eye)


def dense(x: Any) -> Array:
    """Restore a leaf that is quantised or a product; an array is returned as it is."""
    return x.restore() if hasattr(x, "restore") else jnp.asarray(x)
