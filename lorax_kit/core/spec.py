"""What to adapt, as data: ordered rules from path patterns to settings. JSON in, JSON out.

    Spec({"**/attention/{query,value}/kernel": LoRA(rank=8, alpha=16), "classifier/**": Full()})

The first rule that matches a path wins; `exclude` wins over every rule; what no rule matches stays frozen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lorax_kit.core.errors import SpecError
from lorax_kit.core.patterns import compile_pattern, expand_braces

INITS = ("kaiming_uniform", "normal")


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise SpecError(message)


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def plain(x: Any) -> Any:
    """A numpy scalar as Python's own number, so that settings compare, hash and turn into JSON alike."""
    return x.item() if isinstance(x, np.generic) else x


def _float_dtype(name: Any, where: str) -> None:
    try:
        ok = isinstance(name, str) and jnp.issubdtype(jnp.dtype(name), jnp.floating)
    except TypeError:
        ok = False
    _need(ok, f"{where} is {name!r}; it must name a float dtype such as 'float32' or 'bfloat16'.")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Adapt a parameter by a low-rank update, W + scale * delta (Hu et al., arXiv 2106.09685).

    Args:
      rank: rows of `a` and `b`; at least 1, at most min(in, out) of every site.
      alpha: the scale is alpha / rank (or alpha / sqrt(rank)); None means alpha = rank, a scale of 1.
      variant: the method's name in `lorax_kit.variants`: "lora" or "dora".
      init: how the drawn factor starts: "kaiming_uniform" (PEFT's default) or "normal" (std 1/sqrt(in)).
      rslora: scale by alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732).
      dropout: probability in [0, 1) of dropping inputs of the low-rank path while training.
      dtype: dtype in which the factors are stored and trained.
      inputs: which axes of the parameter `a` reads; None: those that the function contracts. To be given only
        where the function uses the parameter in ways that do not agree.
    """

    rank: int
    alpha: float | None = None
    variant: str = "lora"
    init: str = "kaiming_uniform"
    rslora: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    inputs: tuple[int, ...] | None = None
    kind: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "dropout"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        _need(
            _is_int(self.rank) and self.rank >= 1,
            f"rank is {self.rank!r}; it must be an integer of at least 1.\n"
            "  to train no low-rank factors at all, leave the rule out",
        )
        ok = self.alpha is None or (_is_number(self.alpha) and 0 < self.alpha < float("inf"))
        _need(ok, f"alpha is {self.alpha!r}; it must be a positive number.")
        _need(isinstance(self.variant, str), f"variant is {self.variant!r}; it must be a string.")
        _need(self.init in INITS, f"init is {self.init!r}; choose from {', '.join(INITS)}.")
        _need(isinstance(self.rslora, bool), f"rslora is {self.rslora!r}; it must be true or false.")
        ok = _is_number(self.dropout) and 0 <= self.dropout < 1
        _need(ok, f"dropout is {self.dropout!r}; it must lie in [0, 1).")
        _float_dtype(self.dtype, "dtype")
        if self.inputs is not None:
            axes = self.inputs if isinstance(self.inputs, list | tuple) else (None,)
            ok = bool(axes) and all(_is_int(i) and i >= 0 for i in axes) and len(set(axes)) == len(axes)
            _need(ok, f"inputs is {self.inputs!r}; it must list axes of the parameter, such as (0,).")
            object.__setattr__(self, "inputs", tuple(sorted(axes)))

    @property
    def scale(self) -> float:
        """s in W + s * delta."""
        alpha = self.rank if self.alpha is None else self.alpha
        return float(alpha / (self.rank**0.5 if self.rslora else self.rank))


@dataclass(frozen=True, kw_only=True)
class Full:
    """Train a parameter in full: a head, biases, norms. `dtype` at least as wide as its own; None keeps that."""

    dtype: str | None = None
    kind: ClassVar[str] = "full"

    def __post_init__(self) -> None:
        if self.dtype is not None:
            _float_dtype(self.dtype, "dtype")


Setting = LoRA | Full
_KINDS: dict[str, type[LoRA] | type[Full]] = {"lora": LoRA, "full": Full}


def _from_dict(cls: type, data: Any, where: str) -> Any:
    _need(isinstance(data, Mapping), f"{where} is {data!r}; it must be an object of settings.")
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(data) - set(known))
    _need(not unknown, f"{where} has the unknown key {', '.join(map(repr, unknown))}; known: kind, {', '.join(known)}.")
    try:
        return cls(**data)
    except TypeError as e:
        raise SpecError(f"{where}: {e}.") from None


@dataclass(frozen=True)
class Spec:
    """Ordered rules: path pattern -> `LoRA` or `Full`. Hashable; equal specs plan equally.

    A pattern matches whole paths (`lk.paths(params)` lists them): `*` and `?` stay within one name, `**` spans any
    number of names, `{a,b}` is either, each of which must match; `re:` starts a regular expression.

    Args:
      rules: a mapping or a sequence of pairs; order matters, the first match wins.
      exclude: patterns that no rule may touch.
      compute_dtype: dtype of the low-rank products. None: the dtype in which the function itself uses the
        parameter, so a bf16 model computes them in bf16 from fp32 factors, without implicit promotion.

    Raises:
      SpecError: no rules, a malformed pattern, a value that is not a setting.

    Example:
      >>> spec = Spec({"**/query/kernel": LoRA(rank=8, alpha=16)})
      >>> Spec.from_json(spec.to_json()) == spec
      True
    """

    rules: tuple[tuple[str, Setting], ...]
    exclude: tuple[str, ...] = field(default=(), kw_only=True)
    compute_dtype: str | None = field(default=None, kw_only=True)

    def __init__(
        self,
        rules: Mapping[str, Setting] | Sequence[tuple[str, Setting]],
        *,
        exclude: Sequence[str] = (),
        compute_dtype: str | None = None,
    ) -> None:
        pairs = tuple(rules.items() if isinstance(rules, Mapping) else (tuple(pair) for pair in rules))
        _need(len(pairs) > 0, "the spec has no rules; give at least one pattern.")
        _need(not isinstance(exclude, str), f"exclude is the string {exclude!r}; give a list of patterns.")
        for pattern, setting in pairs:
            _need(isinstance(pattern, str) and pattern != "", f"rule pattern {pattern!r} must be a string.")
            ok = isinstance(setting, LoRA | Full)
            _need(ok, f"rule {pattern!r} maps to {setting!r}; it must map to LoRA(...) or Full(...).")
        for pattern in (*(str(p) for p, _ in pairs), *exclude):
            for alternative in expand_braces(pattern):
                compile_pattern(alternative)
        if compute_dtype is not None:
            _float_dtype(compute_dtype, "compute_dtype")
        object.__setattr__(self, "rules", pairs)
        object.__setattr__(self, "exclude", tuple(exclude))
        object.__setattr__(self, "compute_dtype", compute_dtype)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is the inverse."""
        rules = [[pattern, {"kind": s.kind, **asdict(s)}] for pattern, s in self.rules]
        return {"rules": rules, "exclude": list(self.exclude), "compute_dtype": self.compute_dtype}

    @classmethod
    def from_dict(cls, data: Any) -> Spec:
        """Inverse of `to_dict`; unknown keys and wrong types raise `SpecError`."""
        _need(isinstance(data, Mapping), f"a spec must be an object, not {type(data).__name__}.")
        unknown = sorted(set(data) - {"rules", "exclude", "compute_dtype"})
        _need(
            not unknown,
            f"spec has the unknown key {', '.join(map(repr, unknown))}; known: rules, exclude, compute_dtype.",
        )
        rules = data.get("rules")
        if isinstance(rules, Mapping):
            rules = list(rules.items())
        _need(isinstance(rules, list) and len(rules) > 0, "spec 'rules' must be a list of [pattern, settings] pairs.")
        pairs = []
        for i, pair in enumerate(rules, 1):
            _need(isinstance(pair, list | tuple) and len(pair) == 2, f"rule {i} must be a [pattern, settings] pair.")
            pattern, settings = pair
            _need(isinstance(settings, Mapping), f"rule {i} {pattern!r}: settings must be an object.")
            kind = settings.get("kind", "lora")
            _need(kind in _KINDS, f"rule {i} {pattern!r} has kind {kind!r}; choose from {', '.join(_KINDS)}.")
            rest = {k: v for k, v in settings.items() if k != "kind"}
            pairs.append((pattern, _from_dict(_KINDS[kind], rest, f"rule {i} {pattern!r}")))
        exclude = data.get("exclude", [])
        ok = isinstance(exclude, list) and all(isinstance(x, str) for x in exclude)
        _need(ok, "spec 'exclude' must be a list of patterns.")
        return cls(pairs, exclude=exclude, compute_dtype=data.get("compute_dtype"))

    def to_json(self) -> str:
        """The spec as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """Inverse of `to_json`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as e:
            raise SpecError(f"the spec is not JSON: {e}.") from None
        return cls.from_dict(data)
