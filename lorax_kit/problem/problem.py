"""A problem: a model on data with its loss and its metrics. Pure functions and batches, no files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from jax import Array

from lorax_kit.core.method import Hints
from lorax_kit.core.paths import Params
from lorax_kit.core.specs.setting import Full, shown
from lorax_kit.errors import StudyError
from lorax_kit.problem.check import check_problem
from lorax_kit.problem.metric import ACCURACY, Metric, with_loss


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model on a task: what studies, training, evaluation, compression, healing and export take.

    Its parts are checked when it is made: `params` is called for two keys, one batch of each kind is read, and `apply`,
    `loss` and `score` are traced over it; nothing is computed.

    Args:
      name: what adapters remember.
      params: key -> params. Everything but `head` and `state` is the same for every key, in the same buffers.
      apply: (params, batch) -> outputs, of evaluation.
      loss: (outputs, batch) -> mean loss, float (); or `lk.Weighted(total, weight)`, where batches weigh differently.
      score: (outputs, batch) -> sums over the batch's examples: `lk.Score` of a classifier, or a mapping from names to
        sums with their divisor under "weight" (or `lk.Weighted` each), "loss" among them. None: the loss alone, which
        must then be `lk.Weighted`.
      sums: (params, batch) -> what `score` gives for the outputs of `apply`, formed without holding them whole: logits
        of 50,000 words at every place, say. Training and evaluation run it in place of `apply`, `loss` and `score`, as
        far as they need no outputs; its "loss" is then what is trained on. None: they form the outputs.
      metrics: what is measured beside the loss: `lk.Metric`s, or the names "accuracy", "perplexity", "mse". Default:
        "accuracy" where the score is an `lk.Score`.
      metric: the name of the metric that chooses rates and ranks; default: the first of `metrics`, else "loss".
      predict: (outputs, batch) -> what metrics of all outputs read (`Metric(of_outputs=...)`); default: the outputs.
      train_apply: (params, batch, key) -> outputs, of training: with dropout, say; default: `apply`. With `state` it
        returns (outputs, new state), as Flax's `apply(..., mutable=["batch_stats"])` does.
      state: patterns of the leaves that `train_apply` gives anew at every step, such as BatchNorm's statistics
        ("batch_stats/**"): each trial and each adapter has its own, no optimiser moves them.
      head: patterns of the parameters trained in full.
      train: (seed, start) -> endless batches from step `start`. They may have a few shapes: the step is compiled once
        for each, the first must be the largest, and at one step all seeds must have the same.
      val, test: batches that cover each example once.
      targets: patterns of the parameters that compression makes smaller, where no others are asked for.
      layers: patterns of each layer's parameters, in the order in which they run, for compression in turn.
      places: batch -> how much each place of the outputs (all axes but the last) counts, for distillation and for the
        share of places at which two versions agree; None: outputs are not scores of classes.
      counts: batch -> how much each input counts, (rows, tokens), for calibration: padding does not; None: all alike. A
        mapping from patterns to such functions where groups of parameters read different tokens.
      student: (number of layers, params) -> (apply, params) of a model of fewer layers; None: the problem makes none.
      address: "module:object", by which `lorax-kit` finds the problem of an adapter; `lk.problem_at` sets it. Give it
        where the problem is made in a module of your own.
      facts: plain data for the report: sizes, sources.
      hints: path -> what starts that look at data read, from `lk.calibrate`; None where the study has no such start.

    Raises:
      StudyError: a part that breaks its contract.
      PlanError: a pattern of `head` or `state` that matches nothing.
    """

    name: str
    params: Callable[[Array], Params]
    apply: Callable[[Params, Any], Any]
    loss: Callable[[Any, Any], Any]
    train: Callable[[int, int], Iterator[Any]]
    val: Sequence[Any]
    test: Sequence[Any]
    score: Callable[[Any, Any], Any] | None = None
    metrics: Sequence[Metric | str] | None = None
    metric: str = ""
    sums: Callable[[Params, Any], Any] | None = None
    predict: Callable[[Any, Any], Any] | None = None
    train_apply: Callable[[Params, Any, Array], Any] | None = None
    state: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    places: Callable[[Any], Array] | None = None
    counts: Callable[[Any], Any] | Mapping[str, Callable[[Any], Any]] | None = None
    student: Callable[[int, Params], tuple[Callable[[Params, Any], Any], Params]] | None = None
    address: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    hints: Mapping[str, Hints] | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("head", "state", "targets", "layers"):
            patterns = getattr(self, name)
            listed = isinstance(patterns, Sequence) and not isinstance(patterns, str)
            if not listed or not all(isinstance(p, str) for p in patterns):
                raise StudyError(
                    f"{name} of problem {self.name!r} is {shown(patterns)}; it must be a list of patterns of params, "
                    "such as ['batch_stats/**']."
                )
            put(name, tuple(patterns))
        if self.state and self.train_apply is None:
            raise StudyError(f"problem {self.name!r} has state, and no train_apply that gives it anew.")
        if isinstance(self.metrics, str | Metric):
            put("metrics", (self.metrics,))
        classifies = check_problem(self)
        given = self.metrics if self.metrics is not None else (ACCURACY,) if classifies else ()
        put("metrics", with_loss(given))
        names = [one.name for one in self.all_metrics]
        if not self.metric:
            put("metric", names[1] if len(names) > 1 else names[0])
        if self.metric not in names:
            raise StudyError(
                f"metric of problem {self.name!r} is {self.metric!r}, which is not measured; "
                f"there are {', '.join(names)}.\n  give metric=, too, where a problem's metrics are replaced"
            )

    @property
    def all_metrics(self) -> tuple[Metric, ...]:
        """What is measured, the loss first."""
        return self.metrics  # type: ignore[return-value]

    def at(self, address: str, **facts: Any) -> Problem:
        """The same problem with an address and further facts; its parts, checked once, are not checked again."""
        made = copy(self)
        object.__setattr__(made, "address", address)
        object.__setattr__(made, "facts", {**self.facts, **facts})
        return made

    @property
    def remembered(self) -> dict[str, Any]:
        """What an adapter remembers of the problem, as JSON has it: what finds it again, and what its answers read."""
        settings = self.facts.get("settings")
        kept: dict[str, Any] = {"problem": self.name, "settings": settings}
        kept |= {"address": self.address} if self.address else {}
        if isinstance(settings, Mapping) and "task" in settings:
            kept |= {name: self.facts[name] for name in ("labels", "length") if name in self.facts}
        return dict(json.loads(json.dumps(kept)))

    @property
    def whole_rules(self) -> list[tuple[str, Full]]:
        """The rules of a spec for what every trial has for itself: the head, and the state."""
        return [*((p, Full()) for p in self.head), *((p, Full(trained=False)) for p in self.state)]

    @property
    def chief(self) -> Metric:
        """The metric that chooses."""
        return next(one for one in self.all_metrics if one.name == self.metric)

    @property
    def reads_outputs(self) -> bool:
        """Whether a metric reads all outputs on the host."""
        return any(one.of_outputs is not None for one in self.all_metrics)
