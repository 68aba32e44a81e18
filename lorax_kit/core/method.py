"""What a method is: its setting, its leaves, and two pure functions that put them into the normal form.

    W' = out_gain * in_gain * (W + s * sum_r a[r] b[r])        a, b and the gains broadcast against W

`merge`, `transform`, the study and the checkpoints work on this form alone, so a method is one file of
`lorax_kit.methods`, or a few lines of a user's script: `lk.register(Method(...))`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.core.errors import PlanError, SpecError
from lorax_kit.core.setting import Setting

if TYPE_CHECKING:
    from lorax_kit.core.plan import Plan, Site


class Update(NamedTuple):
    """The normal form of one site; None where a term is absent.

    Attributes:
      a: (R, *stack, *in), R rows of the update; not always the rank.
      b: (R, *stack, *out).
      out_gain: (*stack, *out) multiplies the outputs.
      in_gain: (*stack, *in) multiplies the inputs.
    """

    a: Array | None = None
    b: Array | None = None
    out_gain: Array | None = None
    in_gain: Array | None = None


class Hints(NamedTuple):
    """What a start may look at beside W, of one site with S stacked matrices of K inputs; None where not given.

    Attributes:
      gram: (S, K, K) mean of x x^T over the inputs of the site.
      gradient: the gradient of a loss, in the shape of W.
    """

    gram: Any = None
    gradient: Any = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method.

    Attributes:
      setting: its frozen dataclass, a `Setting` with a `kind` of its own.
      leaves: its NamedTuple of arrays; the names of the fields are labels of `lk.partition` and names on disk.
      init: (site, w, key, hints) -> leaves whose update changes nothing. The key is that of the whole split: fold
        it by `lk.site_key(key, site.path)`, unless sites shall share their draws.
      update: (site, w, leaves, scale) -> Update. `scale` is s, which may be traced: only to be used for what
        depends on it; the sum is multiplied by it elsewhere.
      rows: leaves that zeros at the end of their axes extend to a higher rank without changing the update, or the
        gradient of what was there: trials of different rank stack by them.
      frozen: leaves that no optimiser moves and no gradient reaches; or a function of the setting.
      gains: trained leaves that start at a value other than zero, such as magnitudes: weight decay pulls them to
        where they started instead of to zero, and they are kept in at least float32.
      outputs: trained leaves on the side of the outputs, as LoRA's `b`: LoRA+ gives them a rate of their own.
      factors: leaves -> (A, B) where the update is s A^T B, but for a constant, and the leaves `a` and `b` move A and
        B; None for other forms. `lk.riemannian` preconditions by them.
      max_rank: site -> the highest rank that its form can hold there; min(in, out) by default.
      penalty: (site, leaves) -> a term of the loss, or None (`lk.penalty` sums them).
      peft: how PEFT writes it (`lorax_kit.checkpoint`); None where PEFT has no such method.
    """

    setting: type[Setting]
    leaves: type[Any]
    init: Callable[[Any, Array, Array, Hints], Any]
    update: Callable[[Any, Array, Any, Any], Update]
    rows: frozenset[str] = frozenset()
    frozen: frozenset[str] | Callable[[Any], frozenset[str]] = frozenset()
    gains: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset({"b"})
    factors: Callable[[Any], tuple[Array, Array]] | None = None
    max_rank: Callable[[Any], int] | None = None
    penalty: Callable[[Any, Any], Array] | None = None
    peft: Any = None


METHODS: dict[str, Method] = {}
"""Kind -> method; `lorax_kit.methods` fills it, `register` adds to it."""


def register(method: Method) -> Method:
    """Add a method, so that specs, studies, adapters on disk and `adapt` know it by the `kind` of its setting.

    Args:
      method: see `Method`; its own kind may be registered again, another method's may not.

    Returns:
      The method.

    Raises:
      SpecError: something is missing or of the wrong type, or the kind is taken.

    Example:
      >>> from dataclasses import dataclass
      >>> @dataclass(frozen=True, kw_only=True)
      ... class Shift(Setting):
      ...     kind = "shift"
      >>> class Leaves(NamedTuple):
      ...     gain: Array
      >>> def init(site, w, key, hints):
      ...     return Leaves(jnp.ones(site.out_shape))
      >>> def update(site, w, leaves, scale):
      ...     return Update(out_gain=leaves.gain)
      >>> register(Method(setting=Shift, leaves=Leaves, init=init, update=update)).setting.kind
      'shift'
    """
    if not isinstance(method, Method):
        raise SpecError(f"{method!r} is no lk.Method.")
    kind = getattr(method.setting, "kind", "")
    if not (
        isinstance(method.setting, type) and issubclass(method.setting, Setting) and isinstance(kind, str) and kind
    ):
        raise SpecError(f"the setting {method.setting!r} must be a subclass of lk.Setting with a `kind`.")
    fields = getattr(method.leaves, "_fields", None)
    if not fields:
        raise SpecError(f"the leaves of {kind!r} must be a NamedTuple with a field for each array.")
    frozen = frozenset() if callable(method.frozen) else method.frozen
    unknown = (method.rows | frozen | method.gains) - set(fields)
    if unknown:
        raise SpecError(f"method {kind!r} names the leaf {min(unknown)!r}; its leaves are {', '.join(fields)}.")
    taken = METHODS.get(kind)
    if kind == "full" or (taken is not None and taken.setting.__qualname__ != method.setting.__qualname__):
        raise SpecError(f"the kind {kind!r} is taken; choose another.")
    METHODS[kind] = method
    _leaf_shapes.cache_clear()
    return method


def method_of(setting: Setting) -> Method:
    """The method of a setting; one that was never registered raises `SpecError`."""
    if setting.kind not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise SpecError(f"method {setting.kind!r} is unknown; choose from {known}, or lk.register it.")
    return METHODS[setting.kind]


def frozen_leaves(setting: Setting) -> frozenset[str]:
    """Names of the leaves that no optimiser moves."""
    frozen = method_of(setting).frozen
    return frozen(setting) if callable(frozen) else frozen


def trained_leaves(site: Site) -> tuple[str, ...]:
    """Names of the leaves of a site that are trained, in the order of the method's fields."""
    held = frozen_leaves(site.setting)
    return tuple(k for k, x in leaf_shapes(site)._asdict().items() if x is not None and k not in held)


def leaf_shapes(site: Site) -> Any:
    """The method's leaves at a site as `ShapeDtypeStruct`s, None for those it does without: what every check asks.

    Raises:
      PlanError: the method gives something else than its leaves, or an update that does not fit the site.
    """
    return _leaf_shapes(site.unnamed())


@lru_cache(maxsize=4096)
def _leaf_shapes(site: Site) -> Any:
    method = method_of(site.setting)
    s, k = prod(site.stack_shape), prod(site.in_shape)
    w = jax.ShapeDtypeStruct(site.shape, jnp.dtype(site.dtype))
    hints = Hints(jax.ShapeDtypeStruct((s, k, k), jnp.float32), jax.ShapeDtypeStruct(site.shape, jnp.float32))
    key = jax.eval_shape(lambda: jax.random.key(0))
    leaves = jax.eval_shape(lambda w, key, hints: method.init(site, w, key, hints), w, key, hints)
    kind = site.setting.kind
    if not isinstance(leaves, method.leaves):
        raise PlanError(f"init of method {kind!r} returns {type(leaves).__name__}, not its leaves.")
    update = jax.eval_shape(lambda w, leaves: method.update(site, w, leaves, site.scale), w, leaves)
    if not isinstance(update, Update) or (update.a is None) != (update.b is None):
        raise PlanError(f"update of method {kind!r} must return an lk.Update, with both of a and b or neither.")
    ins, outs = (*site.stack_shape, *site.in_shape), (*site.stack_shape, *site.out_shape)
    rows = 0 if update.a is None else update.a.shape[0]
    wanted = ((rows, *ins), (rows, *outs), outs, ins)
    for name, x, shape in zip(Update._fields, update, wanted, strict=True):
        if x is not None and x.shape != shape:
            raise PlanError(
                f"update of method {kind!r} has {name} of shape {x.shape} for a parameter of shape {site.shape}.\n"
                f"  stack {site.stack_shape}, in {site.in_shape}, out {site.out_shape}: it must be {shape}"
            )
    return leaves


def update_of(site: Site, w: Array, leaves: Any, scale: Any) -> Update:
    """The update of a site; no gradient reaches its frozen leaves."""
    held = {k: jax.lax.stop_gradient(x) for k in frozen_leaves(site.setting) if (x := getattr(leaves, k)) is not None}
    return method_of(site.setting).update(site, w, leaves._replace(**held) if held else leaves, scale)


def max_rank(site: Site) -> int:
    """The highest rank that the site's method can hold there."""
    limit = method_of(site.setting).max_rank
    return site.max_rank if limit is None else limit(site)


def penalty(plan: Plan, factors: Any) -> Array:
    """The sum of the methods' own terms of the loss (AdaLoRA's orthogonality), fp32 (); zero where none has one.

    Args:
      plan: from `lk.resolve`.
      factors: the tree that `lk.split` returns.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), params, lambda p, x: x @ p["w"], jnp.ones((5, 4)))
      >>> float(lk.penalty(plan, lk.split(params, plan, jax.random.key(0))[1]))
      0.0
    """
    total = jnp.zeros((), jnp.float32)
    for site in plan.sites:
        term = method_of(site.setting).penalty
        if term is not None:
            total = total + term(site, factors[site.path]).astype(jnp.float32)
    return total
