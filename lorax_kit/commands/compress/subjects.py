"""What is compressed: a problem with trained params, and which of them become smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.checkpoint.adapter import load_adapter, read_meta
from lorax_kit.core.merge import merge
from lorax_kit.core.paths import Params
from lorax_kit.core.plan import Plan
from lorax_kit.core.specs.patterns import literal
from lorax_kit.core.specs.spec import Spec
from lorax_kit.data import Plays
from lorax_kit.errors import CompressError
from lorax_kit.methods import LoRA
from lorax_kit.problem import Metric, Problem
from lorax_kit.problem.evaluate import scored, summarised
from lorax_kit.problems.load import base_of, problem_from, problem_of
from lorax_kit.problems.packaged.plays import PlaysText
from lorax_kit.problems.packaged.sentiment import Sentiment, adapter_folder, workload_of
from lorax_kit.training import Weighted
from lorax_kit.transform import resolve

Apply = Callable[[Params, Any], Any]


class Quality(NamedTuple):
    """What a model is worth on held-out data.

    Attributes:
      metrics: name -> value, the loss among them.
      agreement: share of places whose largest output is the original's; None where the problem says of no places.
      chosen: that output's index for each batch, the reference of other versions' agreement.
    """

    metrics: dict[str, float]
    agreement: float | None
    chosen: list[Array]

    @property
    def loss(self) -> float:
        """The mean loss."""
        return self.metrics["loss"]

    def value(self, metric: str) -> float:
        """Of one metric."""
        return self.metrics[metric]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A problem whose model is made smaller.

    Attributes:
      problem: the model on its data; its `layers`, `places`, `counts` and `student` are read where they are given.
      params: as trained.
      targets: patterns of the parameters to compress.
      origin: {"model", "settings"} of `subject_of`, by which a smaller model finds it again; None of another one.
    """

    problem: Problem
    params: Params
    targets: tuple[str, ...]
    origin: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """Of model and data."""
        return str(self.problem.facts.get("name", self.problem.name))

    @property
    def apply(self) -> Apply:
        """`apply(params, batch)`."""
        return self.problem.apply

    @property
    def test(self) -> Sequence[Any]:
        """Held-out batches."""
        return self.problem.test

    @property
    def metric(self) -> Metric:
        """The one that counts."""
        return self.problem.chief

    def train(self, seed: int) -> Iterator[Any]:
        """An endless stream of batches."""
        return iter(self.problem.train(seed, 0))

    @cached_property
    def sites(self) -> Plan:
        """The targets, resolved."""
        spec = Spec(dict.fromkeys(self.targets, LoRA(rank=1)))
        return resolve(spec, self.params, self.apply, next(self.train(0)))

    def loss(self, outputs: Any, batch: Any) -> Array:
        """The problem's mean loss."""
        loss = self.problem.loss(outputs, batch)
        return loss.total / jnp.maximum(loss.weight, 1e-9) if isinstance(loss, Weighted) else loss

    def student(self, count: int) -> tuple[Apply, Params]:
        """A model of so many layers, evenly taken from this one.

        Raises:
          CompressError: the problem makes none.
        """
        if self.problem.student is None:
            raise CompressError(f"problem {self.problem.name!r} makes no students.\n  give Problem(student=...)")
        return self.problem.student(count, self.params)

    def quality(self, apply: Apply, params: Params, original: Quality | None = None) -> Quality:
        """Measure a version of the model over the held-out data; without `original` it agrees with itself."""
        places = self.problem.places

        @jax.jit
        def score(params: Params, batch: Any, known: Array | None) -> Any:
            outputs = apply(params, batch)
            totals = scored(self.problem, outputs, batch)
            if places is None:
                return totals, None, None
            weight, chosen = places(batch), jnp.argmax(outputs, axis=-1).astype(jnp.int32)
            same = (chosen == (chosen if known is None else known)).astype(weight.dtype)
            return totals, jnp.stack([jnp.sum(same * weight), jnp.sum(weight)]), chosen

        known = [None] * len(self.test) if original is None else original.chosen
        scores = [score(params, batch, own) for batch, own in zip(self.test, known, strict=True)]
        metrics = summarised(self.problem, jax.device_get([one for one, _, _ in scores]), self.test)
        agreed = [np.asarray(sums, np.float64) for _, sums, _ in scores if sums is not None]
        agreement = None if not agreed else float(np.divide(*np.sum(agreed, axis=0)))
        return Quality(metrics, agreement, [chosen for _, _, chosen in scores])


def subject_of(
    model: str | Path | None,
    *,
    targets: Sequence[str] = (),
    address: str | None = None,
    settings: Any = None,
    files: Mapping[str, str] | None = None,
) -> Subject:
    """The model that an adapter makes of its base, a pretrained model on a problem, or a decoder on plays.

    Args:
      model: the folder of an adapter; "smollm2", a GGUF file or a Hugging Face LLaMA folder.
      targets: patterns of the parameters to compress; default: the problem's, or what the adapter adapted.
      address: of the problem, in place of the one that the adapter remembers.
      settings: of a problem, as `problem_from` takes them: its own model is the one that is compressed.
      files: of an adapter's rows, as `problem_of` takes them.

    Raises:
      AdapterError, MissingPackageError, FileNotFoundError, ValueError: what the loaders raise.
    """
    subject = _subject(model, targets, address, settings, files)
    if settings is None and model is not None:
        place = str(Path(model).absolute()) if Path(model).exists() else str(model)
        return replace(subject, origin={"model": place, "settings": None})
    kept = subject.problem.facts.get("settings")
    named = kept if subject.problem.address is None and isinstance(kept, Mapping) and "task" in kept else None
    return replace(subject, origin={"model": None, "settings": named})


def _subject(
    model: str | Path | None,
    targets: Sequence[str],
    address: str | None,
    settings: Any,
    files: Mapping[str, str] | None,
) -> Subject:
    if settings is not None or model is None:
        problem = problem_from(settings)
        return Subject(
            problem=problem, params=problem.params(jax.random.key(0)), targets=tuple(targets) or problem.targets
        )
    if (adapter_folder(model) / "spec").is_dir():
        meta = read_meta(adapter_folder(model))
        packaged = meta.get("problem") == "sentiment" and not meta.get("address")
        if packaged and address is None and not files:
            return sentiment_subject(model, targets=targets)
        return adapter_subject(adapter_folder(model), problem_of(model, address, files), targets)
    if files:
        raise CompressError(f"{str(model)!r} is no adapter, which would remember its rows: give --task, too.")
    if str(model) == "smollm2" or Path(model).suffix == ".gguf" or (Path(model) / "config.json").is_file():
        return text_subject(model, targets=targets)
    if not Path(model).exists():
        raise FileNotFoundError(f"there is no file or folder {str(model)!r}.")
    raise CompressError(
        f"{str(model)!r} is neither an adapter nor a decoder.\n"
        "  give a folder of `lorax-kit train` (its adapter), smollm2, a .gguf file, or a Hugging Face LLaMA folder"
    )


def adapter_subject(adapter: str | Path, problem: Problem, targets: Sequence[str] = ()) -> Subject:
    """The model that an adapter makes of a problem's base.

    Raises:
      AdapterError: no adapter, a damaged one, or one of another base.
    """
    base = base_of(problem, adapter)
    loaded = load_adapter(adapter, base=base)
    own = tuple(literal(site.path) for site in loaded.plan.sites)
    params = merge(base, loaded.factors, loaded.plan)
    return Subject(problem=problem, params=params, targets=tuple(targets) or problem.targets or own)


def sentiment_subject(
    adapter: str | Path, *, targets: Sequence[str] = (), batch_size: int = 32, length: int = 64
) -> Subject:
    """The classifier that an adapter of `lorax-kit train` or of a study makes of its base.

    Args:
      targets: patterns of the parameters to compress; default: the encoder's kernels.
      batch_size, length: of calibration and healing batches.

    Raises:
      AdapterError: no adapter, or one that names no problem known here.
    """
    adapter = adapter_folder(adapter)
    workload: Sentiment = replace(workload_of(adapter), batch_size=batch_size, length=length)
    return adapter_subject(adapter, workload.build(), targets)


def text_subject(
    source: str | Path = "smollm2",
    *,
    targets: Sequence[str] = (),
    batch_size: int = 2,
    length: int = 512,
    held_out: int = 32,
    plays: Plays | None = None,
) -> Subject:
    """A LLaMA decoder, to predict the next tokens of Shakespeare's plays; arguments as `PlaysText` has them.

    Args:
      source: what `load_llama` takes.
      targets: patterns of the parameters to compress; default: the layers' kernels.
      plays: the texts; default: Shakespeare's.

    Raises:
      MissingPackageError, FileNotFoundError, ValueError: what the loaders of models and plays raise.
    """
    problem = PlaysText(model=str(source), batch_size=batch_size, length=length, held_out=held_out).build(plays)
    params = problem.params(jax.random.key(0))
    return Subject(problem=problem, params=params, targets=tuple(targets) or problem.targets)
