"""LoRA: W' = W + s A^T B (Hu et al., arXiv 2106.09685, eq. 3); rsLoRA is the same with s = alpha / sqrt(r).

Symbols: A is `a` (r, *stack, *in), B is `b` (r, *stack, *out), s is `scale`.

A start that gives both factors, A0 and B0 (PiSSA and others), would change W. It does not: with frozen `a0`, `b0` and
trained `a`, `b`, which begin at zero,

    W' = W + s ((A0 + A)^T (B0 + B) - A0^T B0) = W + s (A^T B0 + (A0 + A)^T B)

which is W to the bit at A = B = 0. One base serves all starts, and weight decay pulls to the start instead of to zero.
The price is an update of 2r rows, [a; a0 + a] and [b0; b].
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from functools import partial
from inspect import signature
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array

from lorax_kit.core.leaves import site_key
from lorax_kit.core.method import METHODS, Hints, Method, Update
from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import ScaledSetting, need, shown
from lorax_kit.errors import SpecError
from lorax_kit.methods.peft_lora import form
from lorax_kit.starts import STARTS, start_of
from lorax_kit.starts.draws import draw_rows


@dataclass(frozen=True, kw_only=True)
class LoRA(ScaledSetting):
    """Adapt a parameter by a low-rank update, W + scale * a^T b (Hu et al., arXiv 2106.09685).

    Args:
      rank: rows of `a` and `b`; at least 1, at most min(in, out) of every site.
      alpha: the scale is alpha / rank (or alpha / sqrt(rank)); None means alpha = rank, a scale of 1.
      start: where the factors begin, by its name in `lorax_kit.starts`: "kaiming" (PEFT's default), "pissa", ... Of
        "eva", "corda_ipm", "corda_kpm" and "lora_ga" `lk.split` needs `hints=`, from `lk.calibrate`.
      rslora: scale by alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732).
      freeze_a: train `b` alone (LoRA-FA, Zhang et al., arXiv 2308.03303): the backward pass then needs the r numbers
        a token has behind `a`, and no longer its activations.
      dropout: probability in [0, 1) of dropping inputs of the low-rank path while training.
      dtype: dtype in which the factors are stored and trained.
      inputs: which axes of the parameter `a` reads; None: those that the function contracts. To be given only
        where the function uses the parameter in ways that do not agree, or where no function is traced.
      variant, init: older spellings: `LoRA(variant="dora", ...)` is `DoRA(...)`, and `init` is `start`.
    """

    start: str = "kaiming"
    freeze_a: bool = False
    variant: InitVar[str] = "lora"
    init: InitVar[str | None] = None
    kind: ClassVar[str] = "lora"
    older: ClassVar[tuple[str, ...]] = ("variant", "init")

    def __new__(cls, *, variant: str = "lora", **settings: Any) -> Any:
        """A setting of the method that the older `variant` names; `init` may not contradict `start`."""
        if "start" in settings and settings.get("init") is not None:
            start, init = (start_of(settings[name]) for name in ("start", "init"))
            need(start == init, f"start is {start!r} and init is {init!r}: they are one setting.\n  give start alone")
        if cls is LoRA and variant != "lora":
            if not isinstance(variant, str) or variant not in METHODS:
                raise SpecError(f"variant {shown(variant)} is unknown; choose from {', '.join(sorted(METHODS))}.")
            if "init" in settings:
                init = settings.pop("init")
                settings |= {} if init is None else {"start": init}
            return METHODS[variant].setting(**settings)
        return super().__new__(cls)

    def __post_init__(self, variant: str, init: str | None) -> None:  # type: ignore[override]
        super().__post_init__()
        object.__setattr__(self, "start", start_of(self.start if init is None else init))
        need(isinstance(self.freeze_a, bool), f"freeze_a is {shown(self.freeze_a)}; it must be true or false.")


# For `help` and editors, which would read that of __new__: it takes the settings of every method.
LoRA.__signature__ = signature(partial(LoRA.__init__, None))  # type: ignore[attr-defined, arg-type]


class Factors(NamedTuple):
    """The leaves of LoRA.

    Attributes:
      a: (rank, *stack, *in).
      b: (rank, *stack, *out).
      a0, b0: as `a` and `b`, frozen: where a start that gives both factors begins; None for other starts.
    """

    a: Array
    b: Array
    a0: Array | None = None
    b0: Array | None = None

    @property
    def magnitude(self) -> None:
        """None: LoRA has none (DoRA's leaves do)."""
        return None


def first_factors(site: Site, w: Array, key: Array, hints: Hints) -> Factors:
    """The factors of a setting with a `start`, in its dtype."""
    dtype = jnp.dtype(site.setting.dtype)
    a, b = STARTS[site.setting.start](site, w, site_key(key, site.path), hints)  # type: ignore[attr-defined]
    if (
        a is None and site.lookup and getattr(site.setting, "freeze_a", False)
    ):  # where `a` would start at zero, `b` could not learn
        a, b = draw_rows(site_key(key, site.path), site.a_shape, 1.0), None
    zero_a, zero_b = jnp.zeros(site.a_shape, dtype), jnp.zeros(site.b_shape, dtype)
    if a is not None and b is not None:
        return Factors(zero_a, zero_b, a.astype(dtype), b.astype(dtype))
    return Factors(zero_a if a is None else a.astype(dtype), zero_b if b is None else b.astype(dtype))


def rows_of(leaves: Any) -> tuple[Array, Array]:
    """The rows of the update: a and b, or [a; a0 + a] and [b0; b] where a start gave both factors."""
    if leaves.a0 is None:
        return leaves.a, leaves.b
    return jnp.concatenate([leaves.a, leaves.a0 + leaves.a]), jnp.concatenate([leaves.b0, leaves.b])


def factors_of(leaves: Any) -> tuple[Array, Array]:
    """A and B, wherever they started."""
    return (leaves.a, leaves.b) if leaves.a0 is None else (leaves.a0 + leaves.a, leaves.b0 + leaves.b)


def update(site: Site, w: Array, leaves: Factors, scale: Any) -> Update:
    """A and B as they are; `w` plays no part."""
    return Update(*rows_of(leaves))


def frozen(setting: LoRA) -> frozenset[str]:
    """Where the factors began, and LoRA-FA's `a`."""
    return frozenset({"a0", "b0", "a"} if setting.freeze_a else {"a0", "b0"})


LORA = Method(
    setting=LoRA,
    leaves=Factors,
    init=first_factors,
    update=update,
    rows=frozenset({"a", "b", "a0", "b0"}),
    frozen=frozen,
    factors=factors_of,
    peft=form(dora=False),
)
