"""What can be compressed: a trained model beside the data that calibrate, heal and judge it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.checkpoint.adapter import load_adapter
from lorax_kit.core.merge import merge
from lorax_kit.core.paths import Params
from lorax_kit.core.plan import Plan
from lorax_kit.core.spec import Spec
from lorax_kit.errors import CompressError
from lorax_kit.methods import LoRA
from lorax_kit.models import BertClassifier, BertConfig, LlamaModel, load_bert, load_llama
from lorax_kit.tasks import (
    Plays,
    correct,
    cross_entropies,
    cross_entropy,
    load_plays,
    next_tokens,
    spread_batches,
    window_batches,
    windows,
)
from lorax_kit.transform import resolve
from lorax_kit.workloads.sentiment import adapter_folder, workload_of

Apply = Callable[[Params, Any], Any]


class Quality(NamedTuple):
    """What a model is worth on held-out data.

    Attributes:
      loss: mean cross-entropy, nats.
      accuracy: share of the labels that have the largest logit.
      agreement: share of places whose largest logit is the original's.
      chosen: that logit's index for each batch, the reference of other versions' agreement.
    """

    loss: float
    accuracy: float
    agreement: float
    chosen: list[Array]

    def value(self, metric: str) -> float:
        """Of "accuracy" or "perplexity"."""
        return self.accuracy if metric == "accuracy" else float(np.exp(self.loss))


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained model with what compressing it needs.

    Attributes:
      name: of model and data.
      params, apply: `apply(params, batch)`, logits (..., C).
      targets: patterns of the parameters to compress.
      layers: patterns of each layer's parameters, in the order in which they run.
      labels: batch -> labels (...) and how much each counts (...).
      counts: batch -> how much each input counts, (rows, tokens): padding does not.
      train: an endless stream of batches from a seed.
      test: held-out batches.
      metric: "accuracy" or "perplexity".
      student: how many layers -> `(apply, params)` of a model with so many, evenly taken from this one.
    """

    name: str
    params: Params
    apply: Apply
    targets: tuple[str, ...]
    layers: tuple[str, ...]
    labels: Callable[[Any], tuple[Array, Array]]
    counts: Callable[[Any], Any]
    train: Callable[[int], Iterator[Any]]
    test: Sequence[Any]
    metric: str
    student: Callable[[int], tuple[Apply, Params]]

    @cached_property
    def sites(self) -> Plan:
        """The targets, resolved."""
        spec = Spec(dict.fromkeys(self.targets, LoRA(rank=1)))
        return resolve(spec, self.params, self.apply, next(self.train(0)))

    def loss(self, logits: Array, batch: Any) -> Array:
        """Mean cross-entropy of what counts."""
        return cross_entropy(logits, *self.labels(batch))

    def quality(self, apply: Apply, params: Params, original: Quality | None = None) -> Quality:
        """Measure a version of the model over the held-out data; without `original` it agrees with itself."""

        @jax.jit
        def score(params: Params, batch: Any, known: Array | None) -> tuple[Array, Array]:
            logits = apply(params, batch)
            label, weight = self.labels(batch)
            chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            agreed = jnp.sum((chosen == (chosen if known is None else known)).astype(weight.dtype) * weight)
            losses = jnp.sum(cross_entropies(logits, label) * weight)
            return jnp.stack([losses, correct(logits, label, weight), agreed, jnp.sum(weight)]), chosen

        known = [None] * len(self.test) if original is None else original.chosen
        found = [score(params, batch, own) for batch, own in zip(self.test, known, strict=True)]
        loss, right, agreed, weight = np.sum([np.asarray(sums, np.float64) for sums, _ in found], axis=0)
        return Quality(loss / weight, right / weight, agreed / weight, [chosen for _, chosen in found])


def subject_of(model: str | Path, *, targets: Sequence[str] = ()) -> Subject:
    """An adapter's classifier, or a LLaMA decoder on plays.

    Args:
      model: the folder of an adapter; "smollm2", a GGUF file or a Hugging Face LLaMA folder.
      targets: patterns of the parameters to compress; default: all linear ones of the layers.

    Raises:
      AdapterError, MissingPackageError, FileNotFoundError, ValueError: what the loaders raise.
    """
    if (adapter_folder(model) / "spec").is_dir():
        return sentiment_subject(model, targets=targets)
    if str(model) == "smollm2" or Path(model).suffix == ".gguf" or (Path(model) / "config.json").is_file():
        return text_subject(model, targets=targets)
    if not Path(model).exists():
        raise FileNotFoundError(f"there is no file or folder {str(model)!r}.")
    raise CompressError(
        f"{str(model)!r} is neither an adapter nor a decoder.\n"
        "  give a folder of `lorax-kit train` (its adapter), smollm2, a .gguf file, or a Hugging Face LLaMA folder"
    )


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
    workload = replace(workload_of(adapter), batch_size=batch_size, length=length)
    problem = workload.build()
    base = problem.params(jax.random.key(0))
    loaded = load_adapter(adapter, base=base)
    params = merge(base, loaded.factors, loaded.plan)
    config: BertConfig = load_bert(workload.model).config

    def student(count: int) -> tuple[Apply, Params]:
        model = BertClassifier(replace(config, num_hidden_layers=count), num_classes=2)
        own = {**params, "encoder": fewer_layers(params["encoder"], count)}
        return lambda params, batch: model.apply({"params": params}, batch.ids, batch.mask), own

    return Subject(
        name=problem.facts["name"],
        params=params,
        apply=problem.apply,
        targets=tuple(targets) or ("encoder/layer_*/**/kernel",),
        layers=tuple(f"encoder/layer_{i}/**" for i in range(config.num_hidden_layers)),
        labels=lambda batch: (batch.label, batch.weight),
        counts=lambda batch: batch.mask * batch.weight[:, None],
        train=lambda seed: problem.train(seed, 0),
        test=problem.test,
        metric="accuracy",
        student=student,
    )


def text_subject(
    source: str | Path = "smollm2",
    *,
    targets: Sequence[str] = (),
    batch_size: int = 2,
    length: int = 512,
    held_out: int = 32,
    plays: Plays | None = None,
) -> Subject:
    """A LLaMA decoder, to predict the next tokens of Shakespeare's plays.

    Args:
      source: what `load_llama` takes.
      targets: patterns of the parameters to compress; default: the layers' kernels.
      batch_size, length: of all batches, in windows and tokens.
      held_out: how many windows of texts that were held out are measured on.
      plays: the texts; default: Shakespeare's.

    Raises:
      MissingPackageError, FileNotFoundError, ValueError: what the loaders of models and plays raise.
    """
    loaded, plays = load_llama(source), plays or load_plays()
    config, params = loaded.config, loaded.params
    length = min(length, config.max_position_embeddings)

    def cut(texts: Sequence[str]) -> np.ndarray:
        return np.concatenate([windows(ids, length) for ids in loaded.tokenizer.encode(texts, 2**31)])

    train, test = cut(plays.train), spread_batches(cut(plays.test), batch_size=batch_size, count=held_out)

    def applying(model: LlamaModel) -> Apply:
        return lambda params, batch: model.apply({"params": params}, batch.ids, batch.mask)

    def student(count: int) -> tuple[Apply, Params]:
        return applying(LlamaModel(replace(config, num_hidden_layers=count))), fewer_layers(params, count)

    return Subject(
        name=f"plays, {source}",
        params=params,
        apply=applying(LlamaModel(config)),
        targets=tuple(targets) or ("layer_*/**/kernel",),
        layers=tuple(f"layer_{i}/**" for i in range(config.num_hidden_layers)),
        labels=lambda batch: next_tokens(batch.ids, batch.mask),
        counts=lambda batch: batch.mask,
        train=lambda seed: window_batches(train, batch_size=batch_size, seed=seed),
        test=test,
        metric="perplexity",
        student=student,
    )


def fewer_layers(params: Params, count: int) -> Params:
    """Of modules named `layer_i`, `count` evenly spread ones from the first to the last, renamed; the rest as it is.

    How a student starts (DistilBERT, Sanh et al., arXiv 1910.01108, section 3).
    """
    total = sum(name.startswith("layer_") for name in params)
    if not 1 <= count <= total:
        raise CompressError(f"a student of {count} layers; the model has {total}.")
    taken = [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]
    rest = {name: x for name, x in params.items() if not name.startswith("layer_")}
    return {**rest, **{f"layer_{i}": params[f"layer_{own}"] for i, own in enumerate(taken)}}
