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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import Setting, is_int, plain, shown
from lorax_kit.errors import LoraxError, PlanError, SpecError
from lorax_kit.peft_form import PeftForm


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
    """What data say of one site with S stacked matrices (1 without a stack) of K inputs; None where it is not known.

    `lk.calibrate` sums it. Starts that look beyond W read it, and so does compression.

    Attributes:
      tokens: how many inputs were summed.
      gram: (S, K, K) sum of x x^T over the inputs; None for a table.
      absolute: (S, K) mean of |x|; None for a table.
      counts: (K,) how often each row of a table was looked up; None for a product.
      fisher: (S, K) mean of the squared gradients over batches and outputs. A mean, so that sites of many outputs do
        not count for more: the loss rises by about half of sum_k fisher_k sum_n (dW_kn)^2.
      gradient: mean gradient of the loss over batches, in the shape of W.
    """

    tokens: Any = 0.0
    gram: Any = None
    absolute: Any = None
    counts: Any = None
    fisher: Any = None
    gradient: Any = None

    @property
    def squares(self) -> Any:
        """(S, K) sum of x_k^2; of a table (1, K), how often each row was looked up."""
        if self.counts is not None:
            return self.counts[None]
        return None if self.gram is None else self.gram.diagonal(axis1=1, axis2=2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """One method; two of them are equal where they are one.

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
      peft: how PEFT keeps it; None where PEFT has no such method.
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
    peft: PeftForm | None = None


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
    for name in ("rows", "frozen", "gains", "outputs"):
        named = getattr(method, name)
        if name == "frozen" and callable(named):
            continue  # `frozen_leaves` looks at what it returns
        # `outputs` has a default, which a method need not have.
        _check_names(kind, name, named, fields if name != "outputs" else None, SpecError)
    for name in ("init", "update", "factors", "max_rank", "penalty"):
        call = getattr(method, name)
        if not (callable(call) or (call is None and name not in ("init", "update"))):
            raise SpecError(f"{name} of method {kind!r} is {shown(call)}; it must be a function.")
    taken = METHODS.get(kind)
    if kind == "full" or (taken is not None and taken is not method and not _again(taken.setting, method.setting)):
        raise SpecError(f"the kind {kind!r} is taken; choose another.")
    METHODS[kind] = method
    _leaf_shapes.cache_clear()
    return method


def _check_names(kind: str, name: str, named: Any, fields: Any, error: type[LoraxError]) -> None:
    """Raise `error` unless it is a set of names, of the leaves `fields` where they are given."""
    if not isinstance(named, frozenset | set) or not all(isinstance(x, str) for x in named):
        raise error(
            f"{name} of method {kind!r} is {shown(named)}; it must be a frozenset of names of leaves.\n"
            '  such as frozenset({"a"})'
        )
    unknown = min(named - set(fields), default=None) if fields is not None else None
    if unknown is not None:
        raise error(f"method {kind!r} names the leaf {unknown!r} in {name}; its leaves are {', '.join(fields)}.")


def _again(one: type, two: type) -> bool:
    """Whether two classes are the same one of a user's script, run again (a notebook's cell)."""
    ours = one.__module__.startswith(f"{__package__.partition('.')[0]}.")
    return not ours and (one.__module__, one.__qualname__) == (two.__module__, two.__qualname__)


def method_of(setting: Setting) -> Method:
    """The method of a setting; one that was never registered raises `SpecError`."""
    if setting.kind not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise SpecError(f"method {setting.kind!r} is unknown; choose from {known}, or lk.register it.")
    return METHODS[setting.kind]


def frozen_leaves(setting: Setting) -> frozenset[str]:
    """Names of the leaves that no optimiser moves.

    Raises:
      PlanError: the method's function returns something else.
    """
    method = method_of(setting)
    if not callable(method.frozen):
        return method.frozen
    names = method.frozen(setting)
    _check_names(setting.kind, "frozen", names, method.leaves._fields, PlanError)
    return frozenset(names)


def trained_leaves(site: Site) -> tuple[str, ...]:
    """Names of the leaves of a site that are trained, in the order of the method's fields."""
    held = frozen_leaves(site.setting)
    return tuple(k for k, x in leaf_shapes(site)._asdict().items() if x is not None and k not in held)


def leaf_shapes(site: Site) -> Any:
    """The method's leaves at a site as `ShapeDtypeStruct`s, None for those it does without: what every check asks.

    Raises:
      PlanError: the method gives something else than its leaves, or an update that does not fit the site.
    """
    try:
        return _leaf_shapes(site.unnamed())
    except PlanError as e:  # a method does not know what its site is called
        raise PlanError(f"{site.path!r}: {e}") from None


@lru_cache(maxsize=4096)
def _leaf_shapes(site: Site) -> Any:
    method = method_of(site.setting)
    w = jax.ShapeDtypeStruct(site.shape, jnp.dtype(site.dtype))
    hints = _abstract_hints(site)
    key = jax.eval_shape(lambda: jax.random.key(0))
    kind = site.setting.kind

    def init(w: Any, key: Any, hints: Any) -> Any:
        # Looked at as it is: `eval_shape` makes arrays of numbers, and finds them within dicts.
        leaves = method.init(site, w, key, hints)
        if not isinstance(leaves, method.leaves):
            raise PlanError(f"init of method {kind!r} returns {type(leaves).__name__}, not its leaves.")
        return _check_arrays(f"init of method {kind!r}", leaves)

    def update_at(w: Any, leaves: Any) -> Any:
        update = method.update(site, w, leaves, site.scale)
        if not isinstance(update, Update) or (update.a is None) != (update.b is None):
            raise PlanError(f"update of method {kind!r} must return an lk.Update, with both of a and b or neither.")
        return _check_arrays(f"update of method {kind!r}", update)

    leaves = jax.eval_shape(init, w, key, hints)
    frozen_leaves(site.setting)  # raises where it names what is no leaf
    update = jax.eval_shape(update_at, w, leaves)
    ins, outs = (*site.stack_shape, *site.in_shape), (*site.stack_shape, *site.out_shape)
    rows = 0 if update.a is None or not update.a.shape else update.a.shape[0]
    wanted = ((rows, *ins), (rows, *outs), outs, ins)
    for name, x, shape in zip(Update._fields, update, wanted, strict=True):
        if x is not None and x.shape != shape:
            raise PlanError(
                f"update of method {kind!r} has {name} of shape {x.shape} for a parameter of shape {site.shape}.\n"
                f"  stack {site.stack_shape}, in {site.in_shape}, out {site.out_shape}: it must be {shape}"
            )
    return leaves


def _check_arrays(who: str, made: Any) -> Any:
    """What it made, a NamedTuple of arrays; anything else in it raises `PlanError`."""
    for name, x in made._asdict().items():
        if not (x is None or isinstance(x, Array | np.ndarray | np.generic)):
            raise PlanError(f"{who} returns a {type(x).__name__} as {name!r}; it must be one array, or None.")
    return made


def _abstract_hints(site: Site) -> Hints:
    """All that can be known of a site, as shapes: which leaves a method has does not depend on what was given."""
    s, k = prod(site.stack_shape), prod(site.in_shape)
    sums = {"counts": (k,)} if site.lookup else {"gram": (s, k, k), "absolute": (s, k)}
    shapes = {"tokens": (), "fisher": (s, k), "gradient": site.shape, **sums}
    return Hints(**{name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()})


def update_of(site: Site, w: Array, leaves: Any, scale: Any) -> Update:
    """The update of a site; no gradient reaches its frozen leaves."""
    held = {k: jax.lax.stop_gradient(x) for k in frozen_leaves(site.setting) if (x := getattr(leaves, k)) is not None}
    return method_of(site.setting).update(site, w, leaves._replace(**held) if held else leaves, scale)


def max_rank(site: Site) -> int:
    """The highest rank that the site's method can hold there.

    Raises:
      PlanError: the method's function gives no integer.
    """
    limit = method_of(site.setting).max_rank
    if limit is None:
        return site.max_rank
    highest = plain(limit(site))
    if not is_int(highest):
        raise PlanError(f"max_rank of method {site.setting.kind!r} returns {shown(highest)}; it must be an integer.")
    return int(highest)
