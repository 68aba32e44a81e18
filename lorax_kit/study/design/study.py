"""A study as data: the grid of its trials and how each is trained. JSON in, JSON out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from typing import Any

from lorax_kit.core.method import METHODS
from lorax_kit.core.specs.setting import Full, Setting, is_int, is_number, plain, shown
from lorax_kit.core.specs.spec import Spec, setting_from
from lorax_kit.errors import SpecError, StudyError
from lorax_kit.starts import start_of
from lorax_kit.study.design.sampling import Sample
from lorax_kit.study.design.stopping import Stopping, stopping_from
from lorax_kit.study.design.trial import AXES, FLOAT32_MAX, Trial, check, hyper_of, targets_of, values_of

SCHEDULES = ("constant", "linear", "cosine")
STREAMS = ("shared", "seed")
COMMON = ("stop", "rslora", "steps", "schedule", "warmup", "clip", "stream", "eval_every")
"""Keys that all trials of a folder share: trials that differ in them cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The whole ablation: every combination of the axes' values, and the probe's.

    Axes take one value or a sequence. Those of the first group differ between trials of one program; each combination
    of the others is a program of its own.

    Args:
      rank: ranks, each at least 1.
      alpha: numerators of the scale; None means alpha = rank.
      lr: peak learning rates.
      seed: seeds (`seed=2` is seed number 2). A seed fixes factors, head, random numbers of training and (with
        `stream="seed"`) the order of the data, so trials of one seed are paired.
      targets: name -> patterns of the parameters to adapt, one or several sets.
      weight_decay: of optimisers that have one.
      lr_ratio: LoRA+: the rate of the leaves on the side of the outputs (LoRA's `b`) over the others'.
      hyper: name -> values of further scalars that the optimiser (`b2`, `momentum`) or the problem's loss reads, as
        keywords.

      variant: methods by the kind of their settings: "lora", "dora", ... A method without a rank (IA3) needs rank=1,
        one without an alpha (VeRA) alpha=None: give it a grid of its own.
      settings: method -> further settings of it, such as {"lokr": {"factor": 8}}.
      start: as in `lk.LoRA`.
      dropout: of the low-rank path, in training.
      optimizer: the name of an optimiser of `optax` or `optax.contrib`, "module:function", or the function itself:
        (learning rate by step, **keywords) -> an optax transformation.
      dtype: of the base's float parameters; None: as they are. With float16 gradients are taken of 1,024 times the
        loss (`lk.make_step(loss_scale=)`).
      quantise: how the base's adapted parameters are kept: "int8", "int4", "nf4"; None: as they are.
      batch_size: given to the problem's `train` as a keyword; None: not given.
      accumulate: micro-batches per step.

      grids: several grids in place of one: mappings of axes (and of `settings`) to values, each over the study's own
        values of the axes that it does not name. A list of single trials is a list of grids of one value.
      sample: a design drawn from ranges in place of all combinations: `lk.Sample`.
      probe_lr: learning rates of a probe, which trains the head on the frozen base; empty for
        none. It has the first value of every other axis.
      stop: `lk.Halving` or `lk.MedianRule`: trials that fall behind on the validation set stop early; None: none do.
      rslora: as in `lk.LoRA`.
      steps: optimiser steps per trial.
      schedule: "constant", "linear" or "cosine" decay to zero, after `warmup` steps of linear growth.
      clip: the global norm to clip gradients to, None for none.
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
    weight_decay: Sequence[float] | float = 0.0
    lr_ratio: Sequence[float] | float = 1.0
    hyper: Mapping[str, Sequence[float] | float] = field(default_factory=dict)
    variant: Sequence[str] | str = ("lora",)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    start: Sequence[str] | str = "kaiming"
    dropout: Sequence[float] | float = 0.0
    optimizer: Any = "adamw"
    dtype: Sequence[str | None] | str | None = None
    quantise: Sequence[str | None] | str | None = None
    batch_size: Sequence[int | None] | int | None = None
    accumulate: Sequence[int] | int = 1
    grids: Sequence[Mapping[str, Any]] = ()
    sample: Sample | Mapping[str, Any] | None = None
    probe_lr: Sequence[float] | float = ()
    stop: Stopping | Mapping[str, Any] | None = None
    rslora: bool = False
    steps: int = 100
    schedule: str = "linear"
    warmup: int = 0
    clip: float | None = 1.0
    stream: str = "shared"
    eval_every: int = 0
    makers: Mapping[str, Callable[..., Any]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("makers", dict(self.makers))
        put("optimizer", self._named_optimizers(self.optimizer))
        for name in AXES:
            if name != "targets":
                put(name, values_of(name, getattr(self, name)))
        probes = self.probe_lr if isinstance(self.probe_lr, Sequence) else [self.probe_lr]
        put("probe_lr", tuple(plain(x) for x in probes))
        for x in self.probe_lr:  # type: ignore[union-attr]
            check(AXES["lr"].ok(x), f"study probe_lr holds {shown(x)}; it must be {AXES['lr'].words}.")
        put("targets", targets_of(self.targets))
        put("hyper", hyper_of(self.hyper))
        for name, low in (("steps", 1), ("warmup", 0), ("eval_every", 0)):
            x = getattr(self, name)
            ok = is_int(x) and x >= low
            check(ok, f"study {name} is {shown(x)}; it must be an integer of at least {low}.")
        check(self.warmup < self.steps, f"study warmup {shown(self.warmup)} leaves none of {shown(self.steps)} steps.")
        for name, words in (("schedule", SCHEDULES), ("stream", STREAMS)):
            word = getattr(self, name)
            check(word in words, f"study {name} is {shown(word)}; choose from {', '.join(words)}.")
        clip = self.clip is None or (is_number(self.clip) and 0 < self.clip < FLOAT32_MAX)
        check(clip, "study clip must be positive.")
        check(isinstance(self.rslora, bool), f"study rslora is {shown(self.rslora)}; it must be true or false.")
        ok = isinstance(self.grids, Sequence) and not isinstance(self.grids, str)
        check(ok and all(isinstance(g, Mapping) for g in self.grids), "study grids must be a list of mappings of axes.")
        put("grids", tuple(self._named_grid(grid) for grid in self.grids))
        if self.sample is not None and not isinstance(self.sample, Sample):
            put("sample", Sample.from_dict(self.sample))
        check(
            not (self.grids and self.sample), "a study has grids or a sample, not both.\n  give every grid its values"
        )
        if self.stop is not None:
            put("stop", stopping_from(self.stop))
            ok = self.stop.first < self.steps  # type: ignore[union-attr]
            check(ok, f"study stop begins at step {self.stop.first}, and there are {self.steps}.")  # type: ignore[union-attr]
        self._check_settings()
        names = [trial.name for trial in self.trials()]
        longest = max(names, key=len)
        check(
            len(longest.encode()) <= 200, f"the trial name {longest[:60]!r}... is too long for a file: shorten targets."
        )

    def _named_optimizers(self, given: Any) -> Any:
        """Names of optimisers; functions are kept in `makers`."""
        several = isinstance(given, Sequence) and not isinstance(given, str)
        names = []
        for entry in given if several else [given]:
            if callable(entry):
                name = f"{getattr(entry, '__module__', '')}:{getattr(entry, '__qualname__', type(entry).__name__)}"
                if self.makers.get(name, entry) is not entry:
                    raise StudyError(
                        f"two optimisers of the study are named {name!r}.\n  name functions apart: def, not lambda"
                    )
                self.makers[name] = entry  # type: ignore[index]
                entry = name
            names.append(entry)
        return tuple(names)

    def _named_grid(self, grid: Mapping[str, Any]) -> dict[str, Any]:
        named = {"optimizer": list(self._named_optimizers(grid["optimizer"]))} if "optimizer" in grid else {}
        return {**grid, **named}

    def _check_settings(self) -> None:
        ok = isinstance(self.settings, Mapping)
        check(ok, f"study settings are {shown(self.settings)}; they must map methods to settings.")
        used: set[str] = set()
        drawn = self._drawn()
        for own, settings in self._grids():
            values = own | drawn
            used |= set(values["variant"])
            for kind in values["variant"]:
                self._check_method(kind, values, settings.get(kind, {}))
            for name in values["targets"]:
                known = ", ".join(self.targets)
                check(name in self.targets, f"targets {shown(name)} of a grid are unknown; the study has {known}.")
        unused = sorted(set(self.settings) - used)
        check(not unused, f"study settings are for {', '.join(unused)}, which is no variant of the study.")
        seen = {(t.variant, t.rank, t.alpha, t.start, t.dropout, t.settings): t for t in self.trials() if t.rank > 0}
        for trial in seen.values():
            self.setting(trial)  # raises where a method does not take it

    def _drawn(self) -> dict[str, tuple]:
        """What a sample may draw for each axis: its values, or the ends of its interval."""
        if not isinstance(self.sample, Sample):
            return {}
        ranges = self.sample.ranges
        return {k: (x["low"], x["high"]) if isinstance(x, Mapping) else tuple(x) for k, x in ranges.items()}

    def _check_method(self, kind: str, values: Mapping[str, tuple], more: Any) -> None:
        check(kind in METHODS, f"variant {shown(kind)} is unknown; choose from {', '.join(sorted(METHODS))}.")
        has = {f.name for f in fields(METHODS[kind].setting)}
        check(isinstance(more, Mapping), f"study settings of {kind!r} are {shown(more)}; they must be an object.")
        taken = sorted({"rank", "alpha", "rslora", "start", "dropout", "variant", "init"} & set(more))
        check(not taken, f"study settings of {kind!r} hold {', '.join(taken)}, for which the study has its own key.")
        for name, given, way in (
            ("alpha", values["alpha"] != (None,), "alpha=None"),
            ("rank", values["rank"] != (1,), "rank=1"),
            ("rslora", self.rslora, "rslora=False"),
            ("start", values["start"] != ("kaiming",), "no start"),
            ("dropout", values["dropout"] != (0.0,), "no dropout"),
        ):
            hint = f"\n  give it a grid of its own: grids=[..., {{'variant': {kind!r}, ...}}]"
            check(name in has or not given, f"study variant {shown(kind)} has no {name}; give {way}.{hint}")

    def _grids(self) -> Iterator[tuple[dict[str, tuple], dict[str, Any]]]:
        """(the values of every axis, settings by method) of each grid."""
        defaults: dict[str, tuple] = {name: getattr(self, name) for name in AXES if name != "targets"}
        defaults |= {"targets": tuple(self.targets)}
        defaults |= {f"hyper.{name}": tuple(x) for name, x in self.hyper.items()}  # type: ignore[arg-type]
        for number, grid in enumerate(self.grids or ({},), 1):
            given = dict(grid)
            settings: dict[str, Any] = {**self.settings}
            further = given.pop("settings", None) or {}
            check(isinstance(further, Mapping), f"settings of grid {number} must map methods to settings.")
            for kind, more in further.items():
                settings[kind] = {**settings.get(kind, {}), **more} if isinstance(more, Mapping) else more
            hyper = hyper_of(given.pop("hyper", None) or {})
            unknown = sorted(set(given) - set(AXES))
            check(
                not unknown,
                f"grid {number} of the study has the unknown axis {', '.join(map(repr, unknown))}; known: "
                f"{', '.join(AXES)}, hyper, settings.",
            )
            if "optimizer" in given:
                given["optimizer"] = self._named_optimizers(given["optimizer"])
            axes = {name: values_of(name, x) for name, x in given.items()}
            yield defaults | axes | {f"hyper.{name}": x for name, x in hyper.items()}, settings

    def setting(self, trial: Trial) -> Setting:
        """The setting of the sites of a trial."""
        cls: Any = METHODS[trial.variant].setting
        own: dict[str, Any] = {"rank": trial.rank, "alpha": trial.alpha, "rslora": self.rslora}
        own |= {"start": trial.start, "dropout": trial.dropout}
        has = {f.name for f in fields(cls)}
        more = {k: v for k, v in own.items() if k in has} | {k: json.loads(v) for k, v in trial.settings}
        try:
            return setting_from({"kind": trial.variant, **more}, f"study settings of {trial.variant!r}")  # type: ignore[return-value]
        except SpecError as e:
            raise StudyError(str(e)) from None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of all trials, ascending."""
        return tuple(sorted({seed for values, _ in self._grids() for seed in values["seed"]}))

    @property
    def streams(self) -> tuple[int, ...]:
        """Seeds of the data orders: one for all trials, or with `stream="seed"` one per seed."""
        return self.seeds if self.stream == "seed" else (0,)

    def stream_of(self, trial: Trial) -> int:
        """Index into `streams`."""
        return self.streams.index(trial.seed) if self.stream == "seed" else 0

    def trials(self) -> tuple[Trial, ...]:
        """Every trial once, grid by grid, seeds innermost, the probe last."""
        out: dict[str, Trial] = {}
        first: Trial | None = None
        for values, settings in self._grids():
            for point in product(*values.values()):
                one = dict(zip(values, point, strict=True))
                for drawn in self.sample.points() if isinstance(self.sample, Sample) else ({},):
                    trial = _trial({**one, **drawn}, settings)
                    first = first or trial
                    same = out.setdefault(trial.name, trial) == trial
                    check(same, f"two trials of the study have the same name, {trial.name!r}: rename the targets.")
        assert first is not None
        for lr, seed in product(self.probe_lr, self.seeds):  # type: ignore[arg-type]
            probe = Trial(
                rank=0, alpha=0.0, lr=float(lr), seed=seed, targets="head", optimizer=first.optimizer,
                weight_decay=first.weight_decay, dtype=first.dtype, batch_size=first.batch_size,
                accumulate=first.accumulate, hyper=first.hyper,
            )  # fmt: skip
            out.setdefault(probe.name, probe)
        return tuple(out.values())

    def spec(self, trial: Trial, whole: Sequence[tuple[str, Full]]) -> Spec:
        """The spec of one trial alone; `whole` are the rules of what it has in full (`Problem.whole_rules`)."""
        rules: list[tuple[str, Setting | Full]] = list(whole)
        if trial.rank > 0:
            rules += [(pattern, self.setting(trial)) for pattern in self.targets[trial.targets]]
        trains = trial.rank > 0 or any(setting.trained for _, setting in whole)
        check(trains, f"trial {trial.name!r} trains nothing: the problem has no head for the probe.")
        return Spec(rules)

    def common(self) -> dict[str, Any]:
        """What all trials of one folder share."""
        data = self.to_dict()
        return {name: data[name] for name in COMMON}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is the inverse. Optimisers that are functions stand as "module:function"."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "makers"}
        data["stop"] = self.stop.to_dict() if isinstance(self.stop, Stopping) else None
        data["sample"] = asdict(self.sample) if isinstance(self.sample, Sample) else None
        return json.loads(json.dumps(data))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: Any) -> Study:
        """Inverse of `to_dict`; unknown keys, missing ones and wrong types raise `StudyError`."""
        check(isinstance(data, Mapping), f"a study must be an object, not {type(data).__name__}.")
        data = {("start" if k == "init" else k): v for k, v in data.items()}  # its older name
        known = [f.name for f in fields(cls) if f.name != "makers"]
        unknown = sorted(set(data) - set(known))
        check(not unknown, f"study has the unknown key {', '.join(map(repr, unknown))}; known: {', '.join(known)}.")
        missing = sorted({"rank", "lr", "targets"} - set(data))
        check(
            not missing,
            f"study lacks {', '.join(map(repr, missing))}. A whole one, whose targets are the kernels of all layers:\n"
            '  {"rank": [1, 4, 16], "lr": [0.001], "seed": [0, 1, 2], "steps": 300, "targets": {"all": '
            '["**/layer_*/**/kernel"]}}',
        )
        return cls(**data)


def _trial(values: Mapping[str, Any], settings: Mapping[str, Any]) -> Trial:
    columns = {name: x for name, x in values.items() if not name.startswith("hyper.")}
    hyper = {name.removeprefix("hyper."): x for name, x in values.items() if name.startswith("hyper.")}
    more: Mapping[str, Any] = settings.get(columns["variant"], {})
    columns |= {name: float(columns[name]) for name in ("lr", "dropout", "weight_decay", "lr_ratio")}
    columns |= {
        "alpha": float(columns["rank"] if columns["alpha"] is None else columns["alpha"]),
        "start": start_of(columns["start"]),
    }
    return Trial(
        **columns,
        hyper=tuple(sorted(hyper.items())),
        settings=tuple(sorted((name, json.dumps(plain(x))) for name, x in more.items())),
    )
