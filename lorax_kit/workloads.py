"""Joins models and tasks into problems a study can run: the one place where a name becomes weights and data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp

from lorax_kit.core.errors import StudyError
from lorax_kit.models import BertClassifier, Tokenizer, classifier_params, load_bert
from lorax_kit.study.problem import Problem
from lorax_kit.tasks import (
    Batch,
    Encoded,
    correct,
    cross_entropies,
    cross_entropy,
    encoded,
    eval_batches,
    load_reviews,
    split_reviews,
    train_batches,
)
from lorax_kit.training.evaluate import Score


@dataclass(frozen=True, kw_only=True)
class Sentiment:
    """Film reviews, classified by a BERT encoder with mean pooling and a linear head.

    Args:
      model: "minilm", or a Hugging Face BERT folder.
      source: "rotten_tomatoes", "imdb" or "all".
      batch_size, length: of a training batch, in examples and tokens; longer texts are cut.
      val, test: sizes of the held-out parts.
      buckets: padded lengths for evaluation; longer texts are cut to the last.
    """

    model: str = "minilm"
    source: str = "rotten_tomatoes"
    batch_size: int = 16
    length: int = 48
    val: int = 1000
    test: int = 1066
    buckets: tuple[int, ...] = (24, 32, 48, 64)

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "val", "test"):
            x = getattr(self, name)
            if not isinstance(x, int) or isinstance(x, bool) or x < 1:
                raise StudyError(f"problem {name} is {x!r}; it must be an integer of at least 1.")
        for name in ("model", "source"):
            if not isinstance(getattr(self, name), str):
                raise StudyError(f"problem {name} is {getattr(self, name)!r}; it must be a string.")
        ok = isinstance(self.buckets, list | tuple) and all(isinstance(b, int) and b >= 2 for b in self.buckets)
        if not ok or not self.buckets:
            raise StudyError(f"problem buckets is {self.buckets!r}; it must be a list of lengths of at least 2.")
        object.__setattr__(self, "buckets", tuple(self.buckets))

    @classmethod
    def from_dict(cls, data: Any) -> Sentiment:
        """From JSON data; unknown keys raise `StudyError`."""
        known = list(asdict(cls()))
        if not isinstance(data, dict):
            raise StudyError(f"a problem must be an object, not {type(data).__name__}.")
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise StudyError(f"problem has the unknown key {', '.join(map(repr, unknown))}; known: {', '.join(known)}.")
        return cls(**data)

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
        longest = max(*self.buckets, self.length)
        if longest > pretrained.config.max_position_embeddings:
            raise StudyError(f"length {longest} is above the model's {pretrained.config.max_position_embeddings} positions.")

        def encode(part: Any) -> Encoded:
            return encoded(tokenizer.encode(part.texts, longest), part.labels, 2)

        train, val, test = (encode(part) for part in splits)
        model = BertClassifier(pretrained.config, num_classes=2)

        def batches(seed: int, start: int) -> Iterator[Batch]:
            return train_batches(train, batch_size=self.batch_size, length=self.length, seed=seed, start=start)

        def score(logits: Any, batch: Batch) -> Score:
            losses = jnp.sum(cross_entropies(logits, batch.label) * batch.weight)
            return Score(losses, correct(logits, batch.label, batch.weight), jnp.sum(batch.weight))

        return Problem(
            name="sentiment",
            params=lambda key: classifier_params(pretrained, 2, key),
            apply=lambda params, batch: model.apply({"params": params}, batch.ids, batch.mask),
            loss=lambda logits, batch: cross_entropy(logits, batch.label, batch.weight),
            score=score,
            head=("classifier/{kernel,bias}",),
            train=batches,
            val=eval_batches(val, batch_size=64, buckets=self.buckets),
            test=eval_batches(test, batch_size=64, buckets=self.buckets),
            facts={
                "name": f"{self.source} sentiment, {self.model}",
                "train": len(train.ids),
                "val": len(val.ids),
                "test": len(test.ids),
                "settings": self.to_dict(),
            },
        )
