"""DeLoRA: W' = W + lambda/r sum_i a_i b_i^T, rows of fixed length (Bini et al., arXiv 2503.18225), as PEFT has it.

    a_i = |W| A_i / max(|A_i|, 1e-4)        b_i = B_i / max(|B_i|, 1e-4)        |W| per input, over the outputs

Symbols: A is `a` (r, *stack, *in), B is `b` (r, *stack, *out), lambda is `bound` (*stack), trained, and |W| is `norm`
(*stack, *in), of the first W and frozen; 1/r is the scale.

The length of an update is bounded by lambda, whatever the optimiser does to A and B. Two things are PEFT's and not the
paper's: |W| is a norm for each input in place of one Frobenius norm, and B starts at zero, where the paper takes the
update of a drawn start off the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.arrays.dtypes import wide
from lorax_kit.core.method import Hints, Method, Update
from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import RankSetting, is_float32, need, plain, shown
from lorax_kit.methods.lora import first_factors
from lorax_kit.peft_form import FromPeft, PeftForm, TorchModule
from lorax_kit.starts import start_of

if TYPE_CHECKING:
    from jaxtyping import Float

SHORTEST = 1e-4
"""Rows shorter than this are divided by it."""


@dataclass(frozen=True, kw_only=True)
class DeLoRA(RankSetting):
    """Train the directions of a low-rank update apart from its strength (Bini et al., arXiv 2503.18225).

    Args:
      rank: rows of `a` and `b`; at least 1, at most min(in, out) of every site.
      bound: where lambda starts; PEFT's `delora_lambda`.
      start: where `a` begins, as in `LoRA`; one that gives both factors has no place here.
      dropout: probability in [0, 1) of dropping inputs of the low-rank path while training.
      dtype, inputs: as in `LoRA`. `bound` and the norms are kept in at least float32.
    """

    bound: float = 15.0
    start: str = "kaiming"
    kind: ClassVar[str] = "delora"

    def __post_init__(self, *_: Any) -> None:
        object.__setattr__(self, "bound", plain(self.bound))
        super().__post_init__()
        ok = is_float32(self.bound) and self.bound > 0
        need(ok, f"bound is {shown(self.bound)}; it must be a positive number of float32's range.")
        object.__setattr__(self, "start", start_of(self.start))

    @property
    def scale(self) -> float:
        """1 / rank; lambda is a leaf."""
        return 1.0 / self.rank


class DeLoRALeaves(NamedTuple):
    """The leaves of DeLoRA.

    Attributes:
      a: (rank, *stack, *in).
      b: (rank, *stack, *out).
      bound: (*stack), at least fp32.
      norm: (*stack, *in), at least fp32, frozen.
    """

    a: Array
    b: Array
    bound: Array
    norm: Array


def init(site: Site, w: Array, key: Array, hints: Hints) -> DeLoRALeaves:
    """One factor drawn and the other zero, lambda, and the norms of W."""
    factors = first_factors(site, w, key, hints)
    need(factors.a0 is None, f"start {site.setting.start!r} gives both factors; delora starts from one.")  # type: ignore[attr-defined]
    dtype = wide(site.setting.dtype)
    square = jnp.sum(jnp.square(site.matrices(w).astype(dtype)), axis=-1)
    norm = jnp.sqrt(square).reshape(*site.stack_shape, *site.in_shape)
    bound = jnp.full(site.stack_shape, site.setting.bound, dtype)  # type: ignore[attr-defined]
    return DeLoRALeaves(factors.a, factors.b, bound, norm)


def _unit(x: Array, axes: int) -> Float[Array, " r *stack *own"]:
    """Rows of length 1 over the last `axes` axes, shorter where they were shorter than 1e-4.

    The derivative of the length of a zero row is zero, as torch has it.
    """
    square = jnp.sum(x * x, axis=tuple(range(-axes, 0)), keepdims=True)
    length = jnp.sqrt(jnp.where(square > 0, square, 1)) * (square > 0).astype(x.dtype)
    return x / jnp.maximum(length, SHORTEST)


def update(site: Site, w: Array, leaves: DeLoRALeaves, scale: Any) -> Update:
    """Unit rows, those of A stretched by the norms of W and those of B by lambda."""
    dtype = leaves.norm.dtype
    bound = leaves.bound.reshape(1, *site.stack_shape, *(1,) * len(site.out_shape))
    a = _unit(leaves.a.astype(dtype), len(site.in_shape)) * leaves.norm[None]
    return Update(a, bound.astype(dtype) * _unit(leaves.b.astype(dtype), len(site.out_shape)))


def _shapes(m: TorchModule, tensors: Any) -> dict[str, tuple[int, ...]]:
    rank = m.config["r"]
    out = {"delora_A": (rank, m.size), "delora_B": (m.outputs, rank), "delora_lambda": (1,)}
    return out | ({"delora_w_norm": (m.size,)} if "delora_w_norm" in tensors else {})


def _read(m: TorchModule, tensors: Any) -> FromPeft:
    """Where the norms are not stored, PEFT takes those of the base that it loads."""
    norm = tensors.get("delora_w_norm")
    leaves = {
        "a": tensors["delora_A"],
        "b": tensors["delora_B"].T,
        "bound": tensors["delora_lambda"].reshape(()),
        "norm": np.linalg.norm(m.weight(), axis=1) if norm is None else norm,
    }
    c = m.config
    return FromPeft({"rank": c["r"], "bound": c["delora_lambda"], "dropout": c["module_dropout"] or 0.0}, leaves)


def _write(m: TorchModule, setting: Any, leaves: Any) -> dict[str, Any]:
    return {
        "delora_A": leaves["a"],
        "delora_B": leaves["b"].T,
        "delora_lambda": leaves["bound"].reshape(1),
        "delora_w_norm": leaves["norm"],
    }


DELORA = Method(
    setting=DeLoRA,
    leaves=DeLoRALeaves,
    init=init,
    update=update,
    rows=frozenset({"a", "b"}),
    frozen=frozenset({"norm"}),
    peft=PeftForm(
        peft_type="DELORA",
        axes={"a": "ri", "b": "ro", "bound": "", "norm": "i"},
        layers=frozenset({"Linear"}),
        keys={"r": 8, "delora_lambda": 15, "module_dropout": 0.0},
        patterns={"r": "rank_pattern", "delora_lambda": "lambda_pattern"},
        training=frozenset({"init_weights"}),
        bias="delora_only",
        endings=("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
        shapes=_shapes,
        read=_read,
        write=_write,
        config=lambda m, setting, leaves: {
            "r": setting.rank,
            "delora_lambda": setting.bound,
            "module_dropout": setting.dropout,
        },
    ),
)
