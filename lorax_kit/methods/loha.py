"""LoHa: W' = W + s (A1^T B1) * (A2^T B2), entry by entry (Hyeon-Woo et al., arXiv 2108.06098, eq. 3).

Symbols: A1, A2 are `a1`, `a2` (r, *stack, *in), B1, B2 are `b1`, `b2` (r, *stack, *out), s is `scale`.

The product is the sum over pairs (i, j) of (a1_i * a2_j)^T (b1_i * b2_j): r^2 rows, a Khatri-Rao product. Where r^2
exceeds min(in, out), the rows are those of an identity and of the product itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.core.leaves import site_key
from lorax_kit.core.lowrank import identity_rows
from lorax_kit.core.method import Hints, Method, Update
from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import ScaledSetting
from lorax_kit.peft_form import FromPeft, PeftForm, TorchModule
from lorax_kit.starts.draws import draw_rows

if TYPE_CHECKING:
    from jaxtyping import Float

HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True, kw_only=True)
class LoHa(ScaledSetting):
    """Adapt a parameter by the entrywise product of two low-rank matrices (FedPara, arXiv 2108.06098).

    Args:
      rank: of each of the two; at least 1, at most min(in, out) of every site. Their product has up to rank^2.
      alpha, rslora, dropout, dtype, inputs: as in `LoRA`.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((6, 5))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoHa(rank=2)}), params, lambda p, x: x @ p["w"], jnp.ones((5, 6)))
      >>> [x.shape for x in lk.split(params, plan, jax.random.key(0))[1]["w"]]
      [(2, 6), (2, 5), (2, 6), (2, 5)]
    """

    kind: ClassVar[str] = "loha"


class LoHaLeaves(NamedTuple):
    """The leaves of LoHa.

    Attributes:
      a1, a2: (rank, *stack, *in).
      b1, b2: (rank, *stack, *out).
    """

    a1: Array
    b1: Array
    a2: Array
    b2: Array


def init(site: Site, w: Array, key: Array, hints: Hints) -> LoHaLeaves:
    """PEFT's start: A2 zero, A1 from U(-1, 1) / sqrt(in), B1 and B2 from U(-1, 1) / sqrt(rank)."""
    dtype, own = jnp.dtype(site.setting.dtype), site_key(key, site.path)

    def drawn(name: str, shape: tuple[int, ...], summed: int) -> Array:
        return draw_rows(site_key(own, name), shape, summed**-0.5, uniform=True, dtype=dtype)

    return LoHaLeaves(
        a1=drawn("a1", site.a_shape, 1 if site.lookup else prod(site.in_shape)),
        b1=drawn("b1", site.b_shape, site.rank),
        a2=jnp.zeros(site.a_shape, dtype),
        b2=drawn("b2", site.b_shape, site.rank),
    )


def dense_product(a: Float[Array, " r stack in"], b: Float[Array, " r stack out"]) -> Float[Array, " stack in out"]:
    """a^T b of each stacked matrix."""
    return jnp.einsum("rsi,rso->sio", a, b, precision=HIGHEST)


def update(site: Site, w: Array, leaves: LoHaLeaves, scale: Any) -> Update:
    """Rows of pairs; or at most min(in, out) of the dense product."""
    a1, b1, a2, b2 = leaves
    rank, ins, outs = a1.shape[0], prod(site.in_shape), prod(site.out_shape)
    if rank**2 <= min(ins, outs):
        return Update(*((x[:, None] * y[None]).reshape(rank**2, *x.shape[1:]) for x, y in ((a1, a2), (b1, b2))))
    pairs = ((a1, b1), (a2, b2))
    one, two = (dense_product(a.reshape(rank, -1, ins), b.reshape(rank, -1, outs)) for a, b in pairs)
    shapes = ((*site.stack_shape, *site.in_shape), (*site.stack_shape, *site.out_shape))
    return Update(*(x.reshape(x.shape[0], *shape) for x, shape in zip(identity_rows(one * two), shapes, strict=True)))


def tucker(core: Any, inner: Any) -> Any:
    """Rows (r, inputs) of a convolution that PEFT keeps as a core (r, r, *window) and channels (r, channels)."""
    rows = np.einsum("ij...,jc->ic...", np.asarray(core, np.float64), np.asarray(inner, np.float64))
    return rows.reshape(len(rows), -1)


def is_tucker(m: TorchModule) -> bool:
    """Whether PEFT gives a convolution a core: one of which the window is more than a point."""
    return bool(m.config["use_effective_conv2d"]) and any(size != 1 for size in m.inputs[1:])


def alpha_of(setting: Any) -> float:
    """The alpha whose quotient with the rank is the scale."""
    return float(setting.scale * setting.rank if setting.rslora else setting.effective_alpha)


def _shapes(m: TorchModule, tensors: Any) -> dict[str, tuple[int, ...]]:
    rank, core = m.config["r"], is_tucker(m)
    out: dict[str, tuple[int, ...]] = {}
    for k in "12":
        out[f"hada_w{k}_a"] = (rank, m.outputs) if core else (m.outputs, rank)
        out[f"hada_w{k}_b"] = (rank, m.inputs[0] if core else m.size)
        if core:
            out[f"hada_t{k}"] = (rank, rank, *m.inputs[1:])
    return out


def _read(m: TorchModule, tensors: Any) -> FromPeft:
    leaves = {}
    for k in "12":
        a, b = tensors[f"hada_w{k}_b"], tensors[f"hada_w{k}_a"]
        core = tensors.get(f"hada_t{k}")
        leaves[f"a{k}"], leaves[f"b{k}"] = (a, b.T) if core is None else (tucker(core, a), b)
    return FromPeft({"rank": m.config["r"], "alpha": m.config["alpha"]}, leaves)


def _write(m: TorchModule, setting: Any, leaves: Any) -> dict[str, Any]:
    return {f"hada_w{k}_a": leaves[f"b{k}"].T for k in "12"} | {f"hada_w{k}_b": leaves[f"a{k}"] for k in "12"}


LOHA = Method(
    setting=LoHa,
    leaves=LoHaLeaves,
    init=init,
    update=update,
    rows=frozenset({"a1", "b1", "a2", "b2"}),
    outputs=frozenset({"b1", "b2"}),
    peft=PeftForm(
        peft_type="LOHA",
        axes={"a1": "ri", "b1": "ro", "a2": "ri", "b2": "ro"},
        layers=frozenset({"Linear", "Conv1d", "Conv2d"}),
        keys={"r": 8, "alpha": 8, "use_effective_conv2d": False},
        patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
        training=frozenset({"rank_dropout", "module_dropout", "init_weights"}),
        endings=tuple(f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        shapes=_shapes,
        read=_read,
        write=_write,
        config=lambda m, setting, leaves: {
            "r": setting.rank,
            "alpha": alpha_of(setting),
            "use_effective_conv2d": False,
        },
    ),
)
