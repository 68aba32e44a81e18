"""What to adapt, as data: ordered rules from path patterns to settings. JSON in, JSON out.

    Spec({"**/attention/{query,value}/kernel": LoRA(rank=8, alpha=16), "classifier/**": Full()})

The first rule that matches a path wins; `exclude` wins over every rule; what no rule matches stays frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lorax_kit.core.method import METHODS
from lorax_kit.core.specs.patterns import check_pattern
from lorax_kit.core.specs.setting import Full, Setting, check_float_dtype, need, shown
from lorax_kit.errors import SpecError
from lorax_kit.json_text import parse_json, sealed_json

AnySetting = Setting | Full
KEYS = ("rules", "exclude", "compute_dtype", "cap_ranks")


def setting_class(kind: Any) -> type[Any] | None:
    """The class of the settings of a kind, or None."""
    if kind == Full.kind:
        return Full
    method = METHODS.get(kind) if isinstance(kind, str) else None
    return None if method is None else method.setting


def setting_from(data: Mapping[str, Any], where: str) -> AnySetting:
    """The setting that plain data describe: its `kind` ("lora" where it has none), and the keywords of its class.

    Raises:
      SpecError: an unknown kind or key, a wrong type or value; `where` begins the message.
    """
    kind = data.get("kind", "lora")
    cls = setting_class(kind)
    if cls is None:
        raise SpecError(
            f"{where} has kind {shown(kind)}; choose from {', '.join((*METHODS, Full.kind))}.\n"
            "  for a method of your own, import the module that registers it before"
        )
    data = {k: v for k, v in data.items() if k != "kind"}
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(data) - {*known, *cls.older})
    need(not unknown, f"{where} has the unknown key {', '.join(map(repr, unknown))}; known: kind, {', '.join(known)}.")
    try:
        return cls(**data)  # type: ignore[no-any-return]
    except TypeError as e:
        raise SpecError(f"{where}: {e}.") from None


def _setting_data(setting: AnySetting) -> dict[str, Any]:
    data = {"kind": setting.kind, **asdict(setting)}
    if isinstance(setting, Full) and setting.trained:
        del data["trained"]
    return data


@dataclass(frozen=True)
class Spec:
    """Ordered rules: path pattern -> a method's setting, or `Full`. Hashable; equal specs plan equally.

    A pattern matches whole paths (`lk.paths(params)` lists them): `*` and `?` stay within one name, `**` spans any
    number of names, `{a,b}` is either, each of which must match; `re:` starts a regular expression.

    Args:
      rules: a mapping or a sequence of pairs; order matters, the first match wins.
      exclude: patterns that no rule may touch.
      compute_dtype: dtype of the low-rank products. None: the dtype in which the function itself uses the
        parameter, so a bf16 model computes them in bf16 from fp32 factors, without implicit promotion.
      cap_ranks: lower a rank that a site cannot hold to the highest one that it can, and report it in `Plan.capped`;
        otherwise such a rank is an error. A scale of alpha / rank is that of the lower rank.

    Raises:
      SpecError: no rules, a malformed pattern, a value that is not a setting.

    Example:
      >>> from lorax_kit import LoRA
      >>> spec = Spec({"**/query/kernel": LoRA(rank=8, alpha=16)})
      >>> Spec.from_json(spec.to_json()) == spec
      True
    """

    rules: tuple[tuple[str, AnySetting], ...]
    exclude: tuple[str, ...] = field(default=(), kw_only=True)
    compute_dtype: str | None = field(default=None, kw_only=True)
    cap_ranks: bool = field(default=False, kw_only=True)

    def __init__(
        self,
        rules: Mapping[str, Any] | Sequence[tuple[str, Any]],
        *,
        exclude: Sequence[str] = (),
        compute_dtype: str | None = None,
        cap_ranks: bool = False,
    ) -> None:
        pairs = tuple(rules.items() if isinstance(rules, Mapping) else (tuple(pair) for pair in rules))
        need(len(pairs) > 0, "the spec has no rules; give at least one pattern.")
        need(not isinstance(exclude, str), f"exclude is the string {exclude!r}; give a list of patterns.")
        for pattern, setting in pairs:
            need(isinstance(pattern, str) and pattern != "", f"rule pattern {pattern!r} must be a string.")
            ok = isinstance(setting, Setting | Full)
            need(
                ok,
                f"rule {pattern!r} maps to {shown(setting)}; it must map to LoRA(...), another method, or Full(...).",
            )
        for pattern in (*(str(p) for p, _ in pairs), *exclude):
            check_pattern(pattern)
        if compute_dtype is not None:
            check_float_dtype(compute_dtype, "compute_dtype")
        need(isinstance(cap_ranks, bool), f"cap_ranks is {shown(cap_ranks)}; it must be true or false.")
        object.__setattr__(self, "rules", pairs)
        object.__setattr__(self, "exclude", tuple(exclude))
        object.__setattr__(self, "compute_dtype", compute_dtype)
        object.__setattr__(self, "cap_ranks", cap_ranks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is the inverse."""
        rules = [[pattern, _setting_data(s)] for pattern, s in self.rules]
        plain = {"rules": rules, "exclude": list(self.exclude), "compute_dtype": self.compute_dtype}
        return plain | ({"cap_ranks": True} if self.cap_ranks else {})

    @classmethod
    def from_dict(cls, data: Any) -> Spec:
        """Inverse of `to_dict`; unknown keys and wrong types raise `SpecError`."""
        need(isinstance(data, Mapping), f"a spec must be an object, not {type(data).__name__}.")
        unknown = sorted(set(data) - set(KEYS))
        need(
            not unknown,
            f"spec has the unknown key {', '.join(map(repr, unknown))}; known: {', '.join(KEYS)}.",
        )
        rules = data.get("rules")
        if isinstance(rules, Mapping):
            rules = list(rules.items())
        need(isinstance(rules, list) and len(rules) > 0, "spec 'rules' must be a list of [pattern, settings] pairs.")
        pairs = []
        for i, pair in enumerate(rules, 1):
            need(isinstance(pair, list | tuple) and len(pair) == 2, f"rule {i} must be a [pattern, settings] pair.")
            pattern, settings = pair
            need(isinstance(settings, Mapping), f"rule {i} {pattern!r}: settings must be an object.")
            pairs.append((pattern, setting_from(settings, f"rule {i} {pattern!r}")))
        exclude = data.get("exclude", [])
        ok = isinstance(exclude, list) and all(isinstance(x, str) for x in exclude)
        need(ok, "spec 'exclude' must be a list of patterns.")
        return cls(
            pairs,
            exclude=exclude,
            compute_dtype=data.get("compute_dtype"),
            cap_ranks=data.get("cap_ranks", False),
        )

    def to_json(self) -> str:
        """The spec as JSON text, which `from_json` knows from one that was damaged."""
        return sealed_json(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> Spec:
        """Inverse of `to_json`; whatever is wrong with the text raises `SpecError`."""
        try:
            data = parse_json(text)
        except ValueError as e:
            raise SpecError(f"the spec is not JSON: {e}.") from None
        return cls.from_dict(data)
