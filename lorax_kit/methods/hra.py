"""HRA: W' = H_r ... H_1 W, Householder reflections H = I - 2 u u^T / |u|^2 (Yuan et al., arXiv 2405.17484).

Symbols: u_1, ..., u_r are the rows of `u` (r, *stack, *in); r is even.

Reflections are taken in pairs. With unit vectors u, v and g = u^T v = 1 - |u - v|^2 / 2,

    H_u H_v = I - 2 (u (u - g v)^T + (v - g u) v^T) = I + x y^T,    x = [u, v - g u],  y = -2 [u - g v, v]

which is the identity to the bit where u = v, and there pairs start. The product of all pairs is W + sum_k x_k b_k with
b_k = y_k^T (W + sum_j x_j b_j), j over the earlier pairs, that is

    b = (I - M)^-1 Y^T W,    M[k, j] = y_k^T x_j

with M strictly lower in blocks of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.arrays.dtypes import wide
from lorax_kit.core.leaves import site_key
from lorax_kit.core.method import Hints, Method, Update
from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import RankSetting, need
from lorax_kit.peft_form import FromPeft, PeftForm, TorchModule
from lorax_kit.starts.draws import draw_rows


@dataclass(frozen=True, kw_only=True)
class HRA(RankSetting):
    """Turn the inputs of a parameter by a product of reflections (Yuan et al., arXiv 2405.17484).

    The update is r rows, as LoRA's of rank r, and costs one product of r rows with W more. Angles between the columns
    of W, and their lengths, stay. The paper's penalty on reflections that are not orthogonal is not there.

    Args:
      rank: reflections; even, at least 2, at most the inputs of every site.
      dropout: probability in [0, 1) of dropping inputs of the low-rank path while training.
      dtype, inputs: as in `LoRA`.
    """

    kind: ClassVar[str] = "hra"

    def __post_init__(self, *_: Any) -> None:
        super().__post_init__()
        even = " or ".join(f"rank={r}" for r in (self.rank - 1, self.rank + 1) if r)
        need(
            self.rank % 2 == 0,
            f"rank is {self.rank}; HRA needs an even number of reflections, which start in pairs that cancel.\n"
            f"  give {even}",
        )


class HRALeaves(NamedTuple):
    """The leaf of HRA.

    Attributes:
      u: (rank, *stack, *in); row i is the reflection that acts i-th, its length does not matter.
    """

    u: Array


def init(site: Site, w: Array, key: Array, hints: Hints) -> HRALeaves:
    """Pairs of equal vectors from U(-1/sqrt(in), 1/sqrt(in)), as PEFT draws them."""
    shape = (site.rank // 2, *site.a_shape[1:])
    rows = draw_rows(site_key(key, site.path), shape, prod(site.in_shape) ** -0.5, uniform=True)
    return HRALeaves(jnp.repeat(rows, 2, axis=0).astype(jnp.dtype(site.setting.dtype)))


def _length(x: Array) -> tuple[Array, Array]:
    """Lengths over the last axis, 1 for zero rows, and which rows are not zero; zero rows give no gradient."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    there = square > 0
    return jnp.sqrt(jnp.where(there, square, 1)), there


def pairs(u: Array, v: Array) -> tuple[Array, Array]:
    """x and y of H_u H_v = I + x y^T, (pairs, 2, stack, in) each, of vectors (pairs, stack, in) of any length.

    The difference of the unit vectors is formed from u - v, in which it is linear: subtracting two rounded quotients
    would not be exactly zero where a compiler fuses one of them with the difference. A zero vector is a reflection
    that does nothing, and its gradient is zero.
    """
    (nu, there_u), (nv, there_v) = _length(u), _length(v)
    unit_u, unit_v = jnp.where(there_u, u / nu, 0), jnp.where(there_v, v / nv, 0)
    d = u - v
    longer = jnp.sum(d * (u + v), axis=-1, keepdims=True) / (nu + nv)  # |u| - |v|
    apart = jnp.where(there_u & there_v, (d - v * (longer / nv)) / nu, unit_u - unit_v)
    h = jnp.sum(apart * apart, axis=-1, keepdims=True) / 2  # 1 - g
    u_less_gv, v_less_gu = apart + h * unit_v, h * unit_u - apart
    return jnp.stack([unit_u, v_less_gu], axis=1), -2 * jnp.stack([u_less_gv, unit_v], axis=1)


def inverse(m: Array) -> Array:
    """(I - M)^-1 of M (*S, r, r), strictly lower in blocks of two, by blocks of double size until there is one.

    The inverse of [[A, 0], [-M, D]] is [[A^-1, 0], [D^-1 M A^-1, D^-1]]. No triangular solve: LAPACK's, of a stack,
    waits in jaxlib 0.10 for threads that others hold, and two of them for each other.
    """
    *stack, r, _ = m.shape
    size, n = 2, 1 << (r - 1).bit_length()
    m = jnp.pad(m, [(0, 0)] * len(stack) + [(0, n - r)] * 2)
    done = jnp.broadcast_to(jnp.eye(2, dtype=m.dtype), (*stack, n // 2, 2, 2))
    while size < n:
        count = n // (2 * size)
        blocks = m.reshape(*stack, count, 2, size, count, 2, size)[..., :, 1, :, :, 0, :]  # (*S, i, size, j, size)
        own = jnp.stack([blocks[..., i, :, i, :] for i in range(count)], axis=len(stack))
        first, second = done[..., 0::2, :, :], done[..., 1::2, :, :]
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        lower = jnp.concatenate([second @ own @ first, second], axis=-1)
        done, size = jnp.concatenate([upper, lower], axis=-2), 2 * size
    return done[..., 0, :r, :r]


def update(site: Site, w: Array, leaves: HRALeaves, scale: Any) -> Update:
    """Rows x over the inputs, and b over the outputs."""
    dtype = wide(leaves.u.dtype)
    w3 = site.matrices(w).astype(dtype)
    rows = leaves.u.astype(dtype).reshape(-1, *w3.shape[:2])
    x, y = (z.reshape(rows.shape) for z in pairs(rows[1::2], rows[::2]))
    pair = jnp.arange(len(rows)) // 2
    earlier = (pair[:, None] > pair[None])[None]
    with jax.default_matmul_precision("highest"):
        m = jnp.where(earlier, jnp.einsum("ksi,jsi->skj", y, x), 0)
        products = jnp.einsum("ksi,sio->sko", y, w3)
        b = jnp.einsum("skj,sjo->sko", inverse(m), products)
    return Update(x.reshape(-1, *site.a_shape[1:]), jnp.moveaxis(b, 1, 0).reshape(-1, *site.b_shape[1:]))


def max_rank(site: Site) -> int:
    """The inputs, less one where they are odd."""
    return prod(site.in_shape) // 2 * 2


def _read(m: TorchModule, tensors: Any) -> FromPeft:
    """PEFT's columns as rows; an odd number of them with a zero row, a reflection that does nothing.

    What PEFT makes orthonormal as it runs (apply_GS) is made so here, once.
    """
    _check_window(m)
    u = np.asarray(tensors["hra_u"], np.float64).T
    if m.config["apply_GS"]:
        for i, row in enumerate(u):
            for earlier in u[:i]:
                row = row - (row @ earlier) * earlier
            u[i] = row / np.linalg.norm(row)
    rows = len(u) + len(u) % 2
    return FromPeft({"rank": rows}, {"u": np.pad(u, ((0, rows - len(u)), (0, 0)))})


def _written(leaves: Any) -> Any:
    """The rows without the zero ones, which PEFT would divide by; pairs of equal rows, which cancel, in their place.

    An odd number of reflections stays odd. The pairs come first: so each is a pair to `update`, too, and the identity
    to the bit.
    """
    u = leaves["u"]
    there = u[np.sum(np.square(u.astype(wide(u.dtype))), axis=1) > 0]  # as `_length` sees them
    equal = np.zeros(((len(u) - len(there)) // 2 * 2, u.shape[1]), u.dtype)
    equal[:, :1] = 1
    return np.concatenate([equal, there])


def _write(m: TorchModule, setting: Any, leaves: Any) -> dict[str, Any]:
    _check_window(m)
    return {"hra_u": _written(leaves).T}


def _check_window(m: TorchModule) -> None:
    need(len(set(m.inputs[1:])) <= 1, f"PEFT's HRA has square windows only; that of {m.name!r} is {m.inputs[1:]}.")


HRA_METHOD = Method(
    setting=HRA,
    leaves=HRALeaves,
    init=init,
    update=update,
    rows=frozenset({"u"}),
    max_rank=max_rank,
    peft=PeftForm(
        peft_type="HRA",
        axes={"u": "ri"},
        layers=frozenset({"Linear", "Conv2d"}),
        keys={"r": 8, "apply_GS": False},
        training=frozenset({"init_weights"}),
        bias="hra_only",
        endings=("hra_u",),
        shapes=lambda m, tensors: {"hra_u": (m.size, m.config["r"])},
        read=_read,
        write=_write,
        config=lambda m, setting, leaves: {"r": len(_written(leaves)), "apply_GS": False},
    ),
)
