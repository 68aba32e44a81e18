"""Sentiment of film reviews as a problem for studies, and the commands that train, evaluate and inspect its models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lorax_kit.checkpoint.adapter import read_document
from lorax_kit.core.merge import split
from lorax_kit.core.paths import paths
from lorax_kit.core.quantised import quantise
from lorax_kit.core.spec import AnySetting, Spec
from lorax_kit.errors import AdapterError, PlanError, StudyError
from lorax_kit.models import BertClassifier, Tokenizer, classifier_params, load_bert
from lorax_kit.problem import Problem, Score
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
from lorax_kit.transform import adapt, all_linear, explain, resolve

HEAD = ("classifier/{kernel,bias}",)


@dataclass(frozen=True, kw_only=True)
class Sentiment:
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
        model = BertClassifier(pretrained.config, num_classes=2)

        def batches(seed: int, start: int) -> Iterator[Batch]:
            length = self.length or self.buckets
            return train_batches(train, batch_size=self.batch_size, length=length, seed=seed, start=start)

        def score(logits: Any, batch: Any) -> Score:
            losses = jnp.sum(cross_entropies(logits, batch.label) * batch.weight)
            return Score(losses, correct(logits, batch.label, batch.weight), jnp.sum(batch.weight))

        return Problem(
            name="sentiment",
            params=lambda key: classifier_params(pretrained, 2, key),
            apply=lambda params, batch: model.apply({"params": params}, batch.ids, batch.mask),
            loss=lambda logits, batch: cross_entropy(logits, batch.label, batch.weight),
            score=score,
            head=HEAD,
            train=batches,
            val=eval_batches(val, batch_size=64, buckets=self.buckets),
            test=eval_batches(test, batch_size=64, buckets=self.buckets),
            facts={
                "name": f"{self.source} sentiment, {self.model}",
                "train": len(train.ids),
                "val": len(val.ids),
                "test": len(test.ids),
                "steps_per_epoch": max(len(train.ids) // self.batch_size, 1),
                "settings": self.to_dict(),
            },
        )


def adapter_folder(path: str | Path) -> Path:
    """The adapter itself, given it or the folder that `lorax-kit train` made."""
    inner = Path(path) / "adapter"
    return inner if (inner / "spec").is_dir() else Path(path)


def workload_of(adapter: str | Path) -> Sentiment:
    """What a saved adapter was trained on.

    Raises:
      AdapterError: no adapter, a damaged one, or one that does not say.
    """
    meta = read_document(adapter)["meta"]
    if not isinstance(meta.get("settings"), dict):
        raise AdapterError(f"the adapter at {str(adapter)!r} does not say which problem it was trained on.")
    return Sentiment.from_dict(meta["settings"])


def inspect_model(
    source: str, spec: Spec | AnySetting | None, batch_size: int, tokens: int, method: str | None = None
) -> tuple[dict[str, Any], str]:
    """Parameters of a model, or with a spec how each site runs: as data, and as text.

    A setting is that of `lk.all_linear`, which says on stderr what it took; the head is left out. With a `method` of
    `lk.quantise` the sites' own parameters are kept in few bits.
    """
    pretrained = load_bert(source)
    model = BertClassifier(pretrained.config, num_classes=2)
    params = classifier_params(pretrained, 2, jax.random.key(0))
    rows = [{"path": p, "shape": list(x.shape), "dtype": str(x.dtype)} for p, x in paths(params).items()]
    if spec is None:
        lines = [f"{r['path']:<50} {'x'.join(map(str, r['shape'])):>12}  {r['dtype']}" for r in rows]
        text = "\n".join([*lines, f"{sum(x.size for x in jax.tree_util.tree_leaves(params)):,} parameters"])
        return {"model": source, "parameters": rows}, text
    if tokens > pretrained.config.max_position_embeddings:
        raise StudyError(
            f"{tokens} tokens are above the model's {pretrained.config.max_position_embeddings} positions."
        )
    shape = jax.ShapeDtypeStruct((batch_size, tokens), jnp.int32)

    def apply(params: Any, ids: Any, mask: Any) -> Any:
        return model.apply({"params": params}, ids, mask)

    if not isinstance(spec, Spec):
        spec = all_linear(spec, params, apply, shape, shape, exclude=HEAD)  # type: ignore[arg-type]
    plan = resolve(spec, params, apply, shape, shape)
    base, factors = split(params, plan, jax.random.key(0))
    if method is not None:
        if not plan.sites:
            raise PlanError("the spec adapts no parameter at low rank, so there is none to quantise.")
        base = quantise(base, [site.path for site in plan.sites], method)
    found = explain(adapt(apply, plan), base, factors, shape, shape)
    full = [leaf.path for leaf in plan.full]
    return {"model": source, **found.to_dict(), "full": full, "parameters": rows}, str(found)
