"""Leaves that stand for one parameter each: a frozen one in few bits (`Quantised`), or a product (`LowRank`).

Few bits are int8, int4 or NF4 in blocks with a scale each, restored where the parameter is used.

NF4 and the double quantisation of scales are QLoRA's (Dettmers et al., arXiv 2305.14314, section 3). Two 4-bit codes
share a byte: JAX keeps an int4 array at one code per byte on CPU, which would cost twice what it should.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.dtypes import wide

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (appendix E of the paper).
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
METHODS = ("int8", "int4", "nf4")


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, kw_only=True)
class Quantised:
    """One parameter in blocks along its last axis.

    Attributes:
      codes: int8 (*lead, N), or uint8 (*lead, N / 2) with two 4-bit codes in a byte; N filled up to whole blocks.
      scales: fp32 (*lead, N / block), or uint8 with double quantisation.
      step, offset: fp32, what the codes of the scales mean; None without double quantisation.
      shape, dtype: of the parameter that is restored.
      method, block: "int8", "int4" or "nf4", and how many entries share a scale.
    """

    codes: Array
    scales: Array
    step: Array | None
    offset: Array | None
    shape: tuple[int, ...]
    dtype: Any
    method: str
    block: int

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arrays, and what is static."""
        return (self.codes, self.scales, self.step, self.offset), (self.shape, self.dtype, self.method, self.block)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], arrays: tuple[Any, ...]) -> Quantised:
        """Inverse of `tree_flatten`."""
        names = ("codes", "scales", "step", "offset", "shape", "dtype", "method", "block")
        return cls(**dict(zip(names, (*arrays, *static), strict=True)))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __repr__(self) -> str:
        """Without the codes."""
        return f"Quantised({self.method}, shape={self.shape}, dtype={self.dtype}, block={self.block})"

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def restore(self) -> Array:
        """The parameter, (*shape) in `dtype`; within half a code of what it was."""
        if self.method == "int8":
            values = self.codes.astype(jnp.float32) / 127
        else:
            halves = [(self.codes >> 4)[..., None], (self.codes & 15)[..., None]]  # ONNX's converter lacks `stack`
            pairs = jnp.concatenate(halves, axis=-1).reshape(*self.codes.shape[:-1], -1)
            values = jnp.asarray(NF4)[pairs] if self.method == "nf4" else (pairs.astype(jnp.float32) - 8) / 7
        scales = self.scales
        if self.step is not None and self.offset is not None:
            own = (*(1,) * (scales.ndim - self.step.ndim), *self.step.shape)
            scales = scales.astype(jnp.float32) * self.step.reshape(own) + self.offset.reshape(own)
        blocks = values.reshape(*values.shape[:-1], -1, self.block) * scales[..., None]
        return blocks.reshape(*values.shape)[..., : self.shape[-1]].astype(self.dtype)


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


def dense(x: Any) -> Array:
    """An array as it is, a compact one restored."""
    return x.restore() if isinstance(x, Quantised | LowRank) else jnp.asarray(x)
