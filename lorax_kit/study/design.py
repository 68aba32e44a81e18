"""A study as data: the grid of its trials and how each is trained. JSON in, JSON out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from typing import Any

from lorax_kit.core.method import METHODS
from lorax_kit.core.setting import Full, Setting, is_int, plain, shown
from lorax_kit.core.spec import Spec, setting_from
from lorax_kit.errors import SpecError, StudyError
from lorax_kit.starts import start_of

PROBE = "probe"
FLOAT32_MAX = 3.4e38
SCHEDULES = ("constant", "linear", "cosine")
STREAMS = ("shared", "seed")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of a study. Rank 0 is the frozen-encoder probe: only what is trained in full learns."""

    rank: int
    alpha: float
    lr: float
    seed: int
    targets: str
    variant: str = "lora"

    @property
    def name(self) -> str:
        """A file name, unique within a study."""
        if self.rank == 0:
            return f"{PROBE}_lr{self.lr:g}_s{self.seed}"
        variant = "" if self.variant == "lora" else f"{self.variant}_"
        return f"{variant}r{self.rank}_a{self.alpha:g}_lr{self.lr:g}_{self.targets}_s{self.seed}"


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise StudyError(message)


def _values(name: str, given: Any, kind: type | tuple[type, ...], word: str) -> tuple:
    if isinstance(given, str) or not isinstance(given, Iterable):
        given = [given]
    values = tuple(plain(x) for x in given)
    for x in values:
        ok = isinstance(x, kind) and not isinstance(x, bool)
        _check(ok, f"study {name} holds {shown(x)}; it must be {word}.")
    _check(len(set(values)) == len(values), f"study {name} repeats a value: {shown(list(values))}.")
    return values


@dataclass(frozen=True, kw_only=True)
class Study:
    """The whole ablation: every combination of rank, alpha, lr, seed, targets, variant, and the probe's.

    Args:
      rank: ranks, each at least 1; an int or a sequence, as all of the next five.
      alpha: numerators of the scale; None means alpha = rank.
      lr: peak learning rates.
      seed: seeds, one or a sequence (`seed=2` is seed number 2). A seed fixes factors, head and (with
        `stream="seed"`) the order of the data, so trials of one seed are paired.
      targets: name -> patterns of the parameters to adapt, one or several sets.
      variant: methods by the kind of their settings: "lora", "dora", ... All share the ranks and alphas of the study: a
        method without a rank (IA3) needs rank=1, and one without an alpha (VeRA) alpha=None. Methods that need other
        ranks than LoRA's are studies of their own.
      settings: method -> further settings of it, such as {"lokr": {"factor": 8}}.
      probe_lr: learning rates of the frozen-encoder probe; empty for none.
      rslora, start: as in `lk.LoRA`.
      steps: optimiser steps per trial.
      schedule: "constant", "linear" or "cosine" decay to zero, after `warmup` steps of linear growth.
      weight_decay, clip: of AdamW; clip is the global norm, None for none.
      stream: "shared": all trials see the same batches, and what precedes the first adapted site is computed
        once; "seed": each seed has its own order, and intervals over seeds include its effect.
      eval_every: steps between validations, 0 for only at the end.

    Raises:
      StudyError: an empty or repeated list, a wrong type, a value out of range.

    Example:
      >>> study = Study(rank=[1, 4], lr=[1e-3], seed=range(2), targets={"qv": ["**/{query,value}/kernel"]})
      >>> [trial.name for trial in study.trials()][:2]
      ['r1_a16_lr0.001_qv_s0', 'r1_a16_lr0.001_qv_s1']
    """

    rank: Sequence[int] | int
    lr: Sequence[float] | float
    targets: Mapping[str, Sequence[str]]
    alpha: Sequence[float] | float | None = 16.0
    seed: Sequence[int] | int = (0, 1, 2)
    variant: Sequence[str] | str = ("lora",)
    probe_lr: Sequence[float] | float = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rslora: bool = False
    start: str = "kaiming"
    steps: int = 100
    schedule: str = "linear"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    stream: str = "shared"
    eval_every: int = 0

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        number = (int, float)
        put("rank", _values("rank", self.rank, int, "an integer of at least 1"))
        put("lr", _values("lr", self.lr, number, "a positive number"))
        put("seed", _values("seed", self.seed, int, "an integer"))
        put("variant", _values("variant", self.variant, str, "the name of a method"))
        put("probe_lr", _values("probe_lr", self.probe_lr, number, "a positive number"))
        if self.alpha is not None:
            put("alpha", _values("alpha", self.alpha, number, "a positive number"))
        for name in ("rank", "lr", "seed", "variant", "alpha"):
            value = getattr(self, name)
            _check(value is None or len(value) > 0, f"study {name} is empty; give at least one value.")
        for r in self.rank:  # type: ignore[union-attr]
            _check(
                is_int(r) and r >= 1,
                f"study rank holds {shown(r)}; it must be at least 1.\n  for the frozen probe give probe_lr",
            )
        for name in ("lr", "probe_lr", "alpha"):
            for x in getattr(self, name) or ():
                _check(
                    0 < x < FLOAT32_MAX,
                    f"study {name} holds {shown(x)}; it must be a positive number of float32's range.",
                )
        for s in self.seed:  # type: ignore[union-attr]
            _check(0 <= s < 2**31, f"study seed holds {shown(s)}; it must lie in [0, 2^31).")
        _check(isinstance(self.targets, Mapping) and len(self.targets) > 0, "study targets must map names to patterns.")
        for name, patterns in self.targets.items():
            listed = isinstance(patterns, Sequence) and not isinstance(patterns, str) and len(patterns) > 0
            _check(
                listed and all(isinstance(pattern, str) for pattern in patterns),
                f"study targets {shown(name)} must be a list of patterns.",
            )
            ok = isinstance(name, str) and name.replace("-", "").replace("_", "").isalnum()
            _check(ok, f"study targets name {shown(name)} goes into file names: use letters, digits, '-' and '_'.")
        put("targets", {name: tuple(patterns) for name, patterns in self.targets.items()})
        for name, low in (("steps", 1), ("warmup", 0), ("eval_every", 0)):
            x = getattr(self, name)
            ok = is_int(x) and x >= low
            _check(ok, f"study {name} is {shown(x)}; it must be an integer of at least {low}.")
        _check(self.warmup < self.steps, f"study warmup {shown(self.warmup)} leaves none of {shown(self.steps)} steps.")
        for name, words in (("schedule", SCHEDULES), ("stream", STREAMS)):
            word = getattr(self, name)
            _check(word in words, f"study {name} is {shown(word)}; choose from {', '.join(words)}.")
        ok = isinstance(self.weight_decay, number) and 0 <= self.weight_decay < FLOAT32_MAX
        _check(ok, "study weight_decay must be a number of at least 0.")
        _check(
            self.clip is None or (isinstance(self.clip, number) and 0 < self.clip < FLOAT32_MAX),
            "study clip must be positive.",
        )
        put("start", start_of(self.start))
        self._check_methods()
        names = [t.name for t in self.trials()]
        longest = max(names, key=len)
        _check(
            len(longest.encode()) <= 200, f"the trial name {longest[:60]!r}... is too long for a file: shorten targets."
        )
        _check(len(set(names)) == len(names), "two trials of the study have the same name: values differ too little.")

    def _check_methods(self) -> None:
        for kind in self.variant:
            _check(kind in METHODS, f"variant {shown(kind)} is unknown; choose from {', '.join(sorted(METHODS))}.")
            has = {f.name for f in fields(METHODS[kind].setting)}
            more = self.settings.get(kind, {})
            _check(isinstance(more, Mapping), f"study settings of {kind!r} are {shown(more)}; they must be an object.")
            taken = sorted({"rank", "alpha", "rslora", "start", "variant", "init"} & set(more))
            _check(
                not taken, f"study settings of {kind!r} hold {', '.join(taken)}, for which the study has its own key."
            )
            _check(
                not more.get("dropout"), f"study settings of {kind!r} ask for dropout, which studies do not draw yet."
            )
            for name, given, way in (
                ("alpha", self.alpha is not None, "alpha=None"),
                ("rank", tuple(self.rank) != (1,), "rank=1"),  # type: ignore[arg-type]
                ("rslora", self.rslora, "rslora=False"),
                ("start", self.start != "kaiming", "no start"),
            ):
                _check(name in has or not given, f"study variant {shown(kind)} has no {name}; give {way}.")
        unused = sorted(set(self.settings) - set(self.variant))
        _check(not unused, f"study settings are for {', '.join(unused)}, which is no variant of the study.")
        for trial in {(t.variant, t.rank, t.alpha): t for t in self.trials() if t.rank > 0}.values():
            self.setting(trial)  # raises where a method does not take it

    def setting(self, trial: Trial) -> Setting:
        """The setting of the sites of a trial."""
        cls: Any = METHODS[trial.variant].setting
        own = {"rank": trial.rank, "alpha": trial.alpha, "rslora": self.rslora, "start": self.start}
        has = {f.name for f in fields(cls)}
        more = {k: v for k, v in own.items() if k in has} | dict(self.settings.get(trial.variant, {}))
        try:
            return setting_from({"kind": trial.variant, **more}, f"study settings of {trial.variant!r}")  # type: ignore[return-value]
        except SpecError as e:
            raise StudyError(str(e)) from None

    @property
    def streams(self) -> tuple[int, ...]:
        """Seeds of the data orders: one for all trials, or with `stream="seed"` one per seed."""
        return tuple(self.seed) if self.stream == "seed" else (0,)  # type: ignore[arg-type]

    def stream_of(self, trial: Trial) -> int:
        """Index into `streams`."""
        return self.streams.index(trial.seed) if self.stream == "seed" else 0

    def trials(self) -> tuple[Trial, ...]:
        """Every trial, ranks outermost and seeds innermost, the probe last."""
        out = []
        # Tuples since __post_init__, whatever was given.
        axes: Any = (self.variant, self.targets, self.rank, self.alpha or (None,), self.lr, self.seed)
        for variant, targets, rank, alpha, lr, seed in product(*axes):
            a = float(rank if alpha is None else alpha)
            out.append(Trial(rank=rank, alpha=a, lr=float(lr), seed=seed, targets=targets, variant=variant))
        probes: Any = (self.probe_lr, self.seed)
        for lr, seed in product(*probes):
            out.append(Trial(rank=0, alpha=0.0, lr=float(lr), seed=seed, targets="head"))
        return tuple(out)

    def spec(self, trial: Trial, whole: Sequence[tuple[str, Full]]) -> Spec:
        """The spec of one trial alone; `whole` are the rules of what it has in full (`Problem.whole_rules`)."""
        rules: list[tuple[str, Setting | Full]] = list(whole)
        if trial.rank > 0:
            rules += [(pattern, self.setting(trial)) for pattern in self.targets[trial.targets]]
        trains = trial.rank > 0 or any(setting.trained for _, setting in whole)
        _check(trains, f"trial {trial.name!r} trains nothing: the problem has no head for the probe.")
        return Spec(rules)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is the inverse."""
        out = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items()} | {
            "targets": {name: list(patterns) for name, patterns in self.targets.items()}
        }

    @classmethod
    def from_dict(cls, data: Any) -> Study:
        """Inverse of `to_dict`; unknown keys, missing ones and wrong types raise `StudyError`."""
        _check(isinstance(data, Mapping), f"a study must be an object, not {type(data).__name__}.")
        data = {("start" if k == "init" else k): v for k, v in data.items()}  # its older name
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(data) - set(known))
        _check(not unknown, f"study has the unknown key {', '.join(map(repr, unknown))}; known: {', '.join(known)}.")
        missing = sorted({"rank", "lr", "targets"} - set(data))
        _check(not missing, f"study lacks {', '.join(map(repr, missing))}.")
        return cls(**data)
