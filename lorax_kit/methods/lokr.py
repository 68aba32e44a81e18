"""LoKr: W' = W + s (W1 kron W2), each dense or a low-rank product (KronA, arXiv 2212.10650; LyCORIS, arXiv 2309.14859).

The inputs are factored as m n, the outputs as l k, and W1 is (m, l), W2 (n, k):

    W'[(m, n), (l, k)] = W[(m, n), (l, k)] + s W1[m, l] W2[n, k]

Symbols: W1 is `w1` (*stack, m, l), or A1^T B1 with `a1` (r, *stack, m) and `b1` (r, *stack, l); W2 is `w2`
(*stack, n, k), or A2^T B2 with `a2` (r, *stack, n) and `b2` (r, *stack, k); s is `scale`.

A Kronecker product of matrices with P and with Q rows has P Q rows, a1_p kron a2_q and b1_p kron b2_q. A dense matrix
has the rows of an identity and its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, prod
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array

from lorax_kit.core.leaves import site_key
from lorax_kit.core.lowrank import identity_rows
from lorax_kit.core.method import Hints, Method, Update
from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import ScaledSetting, is_int, need, plain
from lorax_kit.errors import AdapterError
from lorax_kit.methods.loha import alpha_of, dense_product, is_tucker, tucker
from lorax_kit.peft_form import FromPeft, PeftForm, TorchModule
from lorax_kit.starts.draws import draw_rows


@dataclass(frozen=True, kw_only=True)
class LoKr(ScaledSetting):
    """Adapt a parameter by the Kronecker product of two matrices, as PEFT and LyCORIS factor them (arXiv 2309.14859).

    Args:
      rank: of the matrices that are decomposed. As in PEFT one whose longer side is at most 2 * rank stays dense, so
        any rank is allowed.
      factor: the size of W1, m = factor where that divides the number of inputs, l = factor where it divides that of
        the outputs; else the most square factorisation with m, or l, at most `factor`. -1: no bound.
      decompose_both: whether W1 may be decomposed, too.
      alpha, rslora, dropout, dtype, inputs: as in `LoRA`. The scale is alpha / rank even where both are dense.

    Example:
      >>> import jax
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((12, 20))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoKr(rank=1)}), params, lambda p, x: x @ p["w"], jnp.ones((5, 12)))
      >>> leaves = lk.split(params, plan, jax.random.key(0))[1]["w"]
      >>> leaves.w1.shape, leaves.a2.shape, leaves.b2.shape
      ((3, 4), (1, 4), (1, 5))
    """

    factor: int = -1
    decompose_both: bool = False
    kind: ClassVar[str] = "lokr"

    def __post_init__(self, *_: Any) -> None:
        object.__setattr__(self, "factor", plain(self.factor))
        super().__post_init__()
        _check_factor("factor", self.factor)
        need(
            isinstance(self.decompose_both, bool),
            f"decompose_both is {self.decompose_both!r}; it must be true or false.",
        )


def _check_factor(name: str, value: Any) -> None:
    ok = is_int(value) and (value == -1 or value >= 1)
    need(ok, f"{name} is {value!r}; it must be -1, for the most square factors, or an integer of at least 1.")


class LoKrLeaves(NamedTuple):
    """The leaves of LoKr; of each matrix either the dense one or its factors, the others None.

    Attributes:
      w1: (*stack, m, l).
      a1, b1: (rank, *stack, m), (rank, *stack, l).
      w2: (*stack, n, k).
      a2, b2: (rank, *stack, n), (rank, *stack, k).
    """

    w1: Array | None = None
    a1: Array | None = None
    b1: Array | None = None
    w2: Array | None = None
    a2: Array | None = None
    b2: Array | None = None


def factorization(size: int, factor: int) -> tuple[int, int]:
    """`size` as a product of two, as PEFT factors it.

    Example:
      >>> [factorization(128, factor) for factor in (-1, 4, 5, 64)]
      [(8, 16), (4, 32), (4, 32), (64, 2)]
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = isqrt(size) if factor == -1 else min(factor, isqrt(size))
    first = max(m for m in range(1, most + 1) if size % m == 0)
    return first, size // first


class Sizes(NamedTuple):
    """How a site is factored.

    Attributes:
      ins: (m, n); of a convolution n includes the window.
      outs: (l, k).
      decomposed: whether W1 and W2 are.
      channels: which of the site's input axes is factored, and comes first; None: all together.
    """

    ins: tuple[int, int]
    outs: tuple[int, int]
    decomposed: tuple[bool, bool]
    channels: int | None


def sizes(site: Site) -> Sizes:
    """PEFT's factors. Of a convolution it factors the channels, and leaves the window to W2.

    The channels are the input axis beside the outputs, in (*window, in, out) as in (out, in, *window).
    """
    setting, axes, ins = site.setting, site.axes, prod(site.in_shape)
    assert isinstance(setting, LoKr)
    channels = None
    if site.use == "other" and len(axes.inputs) > 1:
        channels = min(range(len(axes.inputs)), key=lambda i: abs(axes.inputs[i] - axes.outputs[0]))
    factored = ins if channels is None else site.in_shape[channels]
    (m, n), outs = factorization(factored, setting.factor), factorization(prod(site.out_shape), setting.factor)
    first, second = setting.rank < max(m, outs[0]) / 2, setting.rank < max(n, outs[1]) / 2
    return Sizes((m, n * (ins // factored)), outs, (first and setting.decompose_both, second), channels)


def init(site: Site, w: Array, key: Array, hints: Hints) -> LoKrLeaves:
    """PEFT's start: W1, or B1, zero; the others from U(-1, 1) / sqrt(N), N the numbers that a product sums."""
    at, rank, stack = sizes(site), site.rank, site.stack_shape
    dtype, own = jnp.dtype(site.setting.dtype), site_key(key, site.path)

    def drawn(name: str, shape: tuple[int, ...], summed: int) -> Array:
        return draw_rows(site_key(own, name), shape, summed**-0.5, uniform=True, dtype=dtype)

    (m, n), outs, (first, second) = at.ins, at.outs, at.decomposed
    read = (1, 1) if site.lookup else (m, n)
    return LoKrLeaves(
        w1=None if first else jnp.zeros((*stack, m, outs[0]), dtype),
        a1=drawn("a1", (rank, *stack, m), read[0]) if first else None,
        b1=jnp.zeros((rank, *stack, outs[0]), dtype) if first else None,
        w2=None if second else drawn("w2", (*stack, n, outs[1]), read[1]),
        a2=drawn("a2", (rank, *stack, n), read[1]) if second else None,
        b2=drawn("b2", (rank, *stack, outs[1]), rank) if second else None,
    )


def _rows(w: Array | None, a: Array | None, b: Array | None, ins: int, outs: int) -> tuple[Array, Array]:
    """(P, stack, in), (P, stack, out) of a matrix, with the fewest rows that its form gives."""
    if w is not None:
        return identity_rows(w.reshape(-1, ins, outs))
    assert a is not None
    assert b is not None
    a, b = a.reshape(a.shape[0], -1, ins), b.reshape(b.shape[0], -1, outs)
    return (a, b) if a.shape[0] <= min(ins, outs) else identity_rows(dense_product(a, b))


def update(site: Site, w: Array, leaves: LoKrLeaves, scale: Any) -> Update:
    """Rows a1_p kron a2_q and b1_p kron b2_q."""
    at, stack = sizes(site), site.stack_shape
    a1, b1 = _rows(leaves.w1, leaves.a1, leaves.b1, at.ins[0], at.outs[0])
    a2, b2 = _rows(leaves.w2, leaves.a2, leaves.b2, at.ins[1], at.outs[1])
    count = a1.shape[0] * a2.shape[0]
    a, b = ((x[:, None, :, :, None] * y[None, :, :, None, :]) for x, y in ((a1, a2), (b1, b2)))
    b = b.reshape(count, *stack, *site.out_shape)
    if at.channels is None:
        return Update(a.reshape(count, *stack, *site.in_shape), b)
    window = [size for i, size in enumerate(site.in_shape) if i != at.channels]
    a = a.reshape(count, *stack, site.in_shape[at.channels], *window)
    return Update(jnp.moveaxis(a, 1 + len(stack), 1 + len(stack) + at.channels), b)


def _halves(m: TorchModule) -> tuple[tuple[int, int], tuple[int, int], bool, bool]:
    """(m, n), (l, k) of the channels and outputs, and whether W1 and W2 are decomposed, by PEFT's rule."""
    c = m.config
    _check_factor("decompose_factor", c["decompose_factor"])
    ins, outs = factorization(m.inputs[0], c["decompose_factor"]), factorization(m.outputs, c["decompose_factor"])
    first, second = (c["r"] < max(ins[i], outs[i]) / 2 for i in (0, 1))
    return ins, outs, bool(first and c["decompose_both"]), second


def _shapes(m: TorchModule, tensors: Any) -> dict[str, tuple[int, ...]]:
    (m_, n), (one, k), first, second = _halves(m)
    rank, window = m.config["r"], m.inputs[1:]
    out: dict[str, tuple[int, ...]] = (
        {"lokr_w1_a": (one, rank), "lokr_w1_b": (rank, m_)} if first else {"lokr_w1": (one, m_)}
    )
    if not second:
        return out | {"lokr_w2": (k, n, *window)}
    if is_tucker(m):
        return out | {"lokr_t2": (rank, rank, *window), "lokr_w2_a": (rank, k), "lokr_w2_b": (rank, n)}
    return out | {"lokr_w2_a": (k, rank), "lokr_w2_b": (rank, n * prod(window))}


def _check_window(m: TorchModule, dense: bool) -> None:
    if m.layer == "Conv1d" and (dense or is_tucker(m)):
        raise AdapterError(
            f"PEFT scrambles LoKr's whole W2 of the one-dimensional convolution {m.name!r}, and fails on its core.\n"
            "  use a rank that decomposes W2"
        )


def _read(m: TorchModule, tensors: Any) -> FromPeft:
    _check_window(m, "lokr_w2" in tensors)
    t, leaves = dict(tensors), {}
    for half in "12":
        if f"lokr_w{half}" in t:
            whole = t[f"lokr_w{half}"]
            leaves[f"w{half}"] = whole.reshape(len(whole), -1).T
            continue
        a, b, core = t[f"lokr_w{half}_b"], t[f"lokr_w{half}_a"], t.get(f"lokr_t{half}")
        leaves[f"a{half}"], leaves[f"b{half}"] = (a, b.T) if core is None else (tucker(core, a), b)
    c = m.config
    setting = {"rank": c["r"], "alpha": c["alpha"], "factor": c["decompose_factor"]}
    return FromPeft(setting | {"decompose_both": bool(c["decompose_both"])}, leaves)


def _write(m: TorchModule, setting: Any, leaves: Any) -> dict[str, Any]:
    m = m._replace(config={"use_effective_conv2d": False})
    _check_window(m, "w2" in leaves)
    out = {}
    for half, window in (("1", ()), ("2", m.inputs[1:])):
        if f"w{half}" in leaves:
            whole = leaves[f"w{half}"].T
            out[f"lokr_w{half}"] = whole.reshape(len(whole), -1, *window) if window else whole
        else:
            out[f"lokr_w{half}_a"], out[f"lokr_w{half}_b"] = leaves[f"b{half}"].T, leaves[f"a{half}"]
    return out


LOKR = Method(
    setting=LoKr,
    leaves=LoKrLeaves,
    init=init,
    update=update,
    rows=frozenset({"a1", "b1", "a2", "b2"}),
    outputs=frozenset({"b1", "b2"}),
    max_rank=lambda site: site.rank,
    peft=PeftForm(
        peft_type="LOKR",
        axes={"w1": "", "a1": "r", "b1": "r", "w2": "", "a2": "r", "b2": "r"},
        layers=frozenset({"Linear", "Conv1d", "Conv2d"}),
        keys={
            **{"r": 8, "alpha": 8, "decompose_both": False, "decompose_factor": -1},
            "use_effective_conv2d": False,
        },
        patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
        training=frozenset({"rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights"}),
        endings=tuple(f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        shapes=_shapes,
        read=_read,
        write=_write,
        config=lambda m, setting, leaves: {
            "r": setting.rank,
            "alpha": alpha_of(setting),
            "decompose_both": setting.decompose_both,
            "decompose_factor": setting.factor,
            "use_effective_conv2d": False,
        },
    ),
)
