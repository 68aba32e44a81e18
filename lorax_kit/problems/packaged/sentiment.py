"""Sentiment of film reviews as a problem for studies, and the commands that train, evaluate and inspect its models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lorax_kit.checkpoint.adapter import read_meta
from lorax_kit.data import Batch, Encoded, Row, encoded, eval_batches, load_reviews, split_reviews, train_batches
from lorax_kit.errors import AdapterError, StudyError
from lorax_kit.models import BertClassifier, Pretrained, Tokenizer, classifier_params, load_bert
from lorax_kit.problem import Problem, Score
from lorax_kit.problems.parts.asked import Asked, asked_texts, chosen
from lorax_kit.problems.parts.layers import fewer_layers
from lorax_kit.problems.settings import Settings
from lorax_kit.tasks import correct, cross_entropies, cross_entropy

HEAD = ("classifier/{kernel,bias}",)
LABELS = ("negative", "positive")
EVALUATED_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Sentiment(Settings):
    """Film reviews, classified by a BERT encoder with mean pooling and a linear head.

    Args:
      model: "minilm", or a Hugging Face BERT folder.
      source: "rotten_tomatoes", "imdb" or "all".
      batch_size, length: of a training batch, in examples and tokens; longer texts are cut. Length None: a batch holds
        texts of similar length, padded to the next of `buckets`; the step is compiled once for each.
      val, test: sizes of the held-out parts.
      buckets: padded lengths for evaluation; longer texts are cut to the last.
    """

    model: str = "minilm"
    source: str = "rotten_tomatoes"
    batch_size: int = 16
    length: int | None = 48
    val: int = 1000
    test: int = 1066
    buckets: tuple[int, ...] = (24, 32, 48, 64)

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "val", "test"):
            x = getattr(self, name)
            if name == "length" and x is None:
                continue
            if not isinstance(x, int) or isinstance(x, bool) or x < 1:
                raise StudyError(f"problem {name} is {x!r}; it must be an integer of at least 1.")
        for name in ("model", "source"):
            if not isinstance(getattr(self, name), str):
                raise StudyError(f"problem {name} is {getattr(self, name)!r}; it must be a string.")
        ok = isinstance(self.buckets, list | tuple) and all(isinstance(b, int) and b >= 2 for b in self.buckets)
        if not ok or not self.buckets:
            raise StudyError(f"problem buckets is {self.buckets!r}; it must be a list of lengths of at least 2.")
        object.__setattr__(self, "buckets", tuple(self.buckets))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` is the inverse."""
        return asdict(self) | {"buckets": list(self.buckets)}

    def build(self) -> Problem:
        """Load weights and data.

        Raises:
          MissingPackageError, FileNotFoundError, ValueError: what the loaders of models and tasks raise.
        """
        pretrained = load_bert(self.model)
        tokenizer = Tokenizer.from_file(pretrained.tokenizer_file)
        splits = split_reviews(load_reviews(self.source), val=self.val, test=self.test)
        longest = max(*self.buckets, self.length or 0)
        if longest > pretrained.config.max_position_embeddings:
            raise StudyError(
                f"length {longest} is above the model's {pretrained.config.max_position_embeddings} positions."
            )

        def encode(part: Any) -> Encoded:
            return encoded(tokenizer.encode(part.texts, longest), part.labels, 2)

        train, val, test = (encode(part) for part in splits)
        largest = max(max(row) for part in (train, val, test) for row in part.ids)
        if largest >= pretrained.config.vocab_size:
            raise StudyError(
                f"the tokenizer of {self.model!r} gives the id {largest}; its model has {pretrained.config.vocab_size} "
                "word embeddings.\n  use the tokenizer.json that belongs to these weights"
            )

        def batches(seed: int, start: int) -> Iterator[Batch]:
            length = self.length or self.buckets
            return train_batches(train, batch_size=self.batch_size, length=length, seed=seed, start=start)

        def score(logits: Any, batch: Any) -> Score:
            losses = jnp.sum(cross_entropies(logits, batch.label) * batch.weight)
            return Score(losses, correct(logits, batch.label, batch.weight), jnp.sum(batch.weight))

        def student(count: int, params: Any) -> tuple[Any, Any]:
            smaller = BertClassifier(replace(pretrained.config, num_hidden_layers=count), num_classes=2)
            own = {**params, "encoder": fewer_layers(params["encoder"], count)}
            return lambda params, batch: smaller.apply({"params": params}, batch.ids, batch.mask), own

        return Problem(
            name="sentiment",
            params=lambda key: classifier_params(pretrained, 2, key),
            apply=_applying(pretrained),
            loss=lambda logits, batch: cross_entropy(logits, batch.label, batch.weight),
            score=score,
            head=HEAD,
            targets=("encoder/layer_*/**/kernel",),
            layers=tuple(f"encoder/layer_{i}/**" for i in range(pretrained.config.num_hidden_layers)),
            places=lambda batch: batch.weight,
            counts=lambda batch: batch.mask * batch.weight[:, None],
            student=student,
            train=batches,
            val=eval_batches(val, batch_size=EVALUATED_AT_ONCE, buckets=self.buckets),
            test=eval_batches(test, batch_size=EVALUATED_AT_ONCE, buckets=self.buckets),
            facts={
                "name": f"{self.source} sentiment, {self.model}",
                "train": len(train.ids),
                "val": len(val.ids),
                "test": len(test.ids),
                "steps_per_epoch": max(len(train.ids) // self.batch_size, 1),
                "settings": self.to_dict(),
            },
        )

    @property
    def asked_columns(self) -> dict[str, str]:
        """The column of texts."""
        return {"text": "text"}

    def to_answer(self, rows: Sequence[Row], facts: Mapping[str, Any]) -> Asked:
        """Reviews to classify; see `Settings.to_answer`."""
        pretrained = load_bert(self.model)
        ids = Tokenizer.from_file(pretrained.tokenizer_file).encode([row.cells["text"] for row in rows], 2**31)
        shape = {"batch_size": EVALUATED_AT_ONCE, "buckets": self.buckets}
        return asked_texts(
            ids,
            lambda key: classifier_params(pretrained, 2, key),
            _applying(pretrained),
            partial(chosen, LABELS),
            **shape,
        )


def _applying(pretrained: Pretrained) -> Callable[[Any, Any], Any]:
    model = BertClassifier(pretrained.config, num_classes=2)
    return lambda params, batch: model.apply({"params": params}, batch.ids, batch.mask)


def adapter_folder(path: str | Path) -> Path:
    """The adapter itself, given it or the folder that `lorax-kit train` made."""
    inner = Path(path) / "adapter"
    if (inner / "spec").is_dir():
        return inner
    if (Path(path) / "training.npz").is_file():
        raise AdapterError(f"{str(path)!r} holds a training that is not finished.\n  the same train command goes on")
    return Path(path)


def workload_of(adapter: str | Path) -> Sentiment:
    """What a saved adapter was trained on.

    Raises:
      AdapterError: no adapter, a damaged one, or one that does not say.
    """
    meta = read_meta(adapter)
    if not isinstance(meta.get("settings"), dict):
        raise AdapterError(f"the adapter at {str(adapter)!r} does not say which problem it was trained on.")
    return Sentiment.from_dict(meta["settings"])
