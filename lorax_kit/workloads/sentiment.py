"""Sentiment of film reviews as a problem for studies, and the commands that train, evaluate and inspect its models."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from lorax_kit.checkpoint.adapter import read_document, save_adapter
from lorax_kit.checkpoint.fingerprint import fingerprint
from lorax_kit.core.leaves import penalty
from lorax_kit.core.merge import merge, split
from lorax_kit.core.paths import paths
from lorax_kit.core.quantised import quantise
from lorax_kit.core.setting import Full
from lorax_kit.core.spec import AnySetting, Spec
from lorax_kit.errors import AdapterError, PlanError, StudyError
from lorax_kit.methods import LoRA
from lorax_kit.models import BertClassifier, Tokenizer, classifier_params, load_bert
from lorax_kit.problem import Evaluator, Problem, Score
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
from lorax_kit.training import fit, make_step, partition
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


def train_adapter(
    workload: Sentiment,
    setting: AnySetting | None = None,
    *,
    out: Path,
    rank: int = 8,
    alpha: float = 16.0,
    variant: str = "lora",
    lr: float,
    seed: int,
    targets: Sequence[str],
    epochs: int,
    steps_per_epoch: int | None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train one adapter by `lk.fit` and save it under `out`; the best epoch by validation loss is kept.

    `targets` are patterns, or "all-linear" alone; without a setting it is `LoRA(rank=, alpha=, variant=)`.

    Interrupted, the same call goes on, to the same bits: `out/training.npz` holds the training until the adapter is
    saved. Each epoch is once in `out/metrics.jsonl`.

    Raises:
      LoraxError: `out` holds an interrupted training of other settings.
    """
    setting = LoRA(rank=rank, alpha=alpha, variant=variant) if setting is None else setting
    if not 0 < lr < float("inf"):
        raise StudyError(f"lr is {lr}; it must be a positive number.")
    if (out / "adapter").exists():
        raise AdapterError(f"{str(out / 'adapter')!r} exists.\n  choose another folder")
    problem = workload.build()
    params = problem.params(jax.random.fold_in(jax.random.key(seed), 0))
    stream, example = problem.train(seed, 0), next(problem.train(seed, 0))
    rules = [(p, setting) for p in targets]
    if tuple(targets) == ("all-linear",):
        rules = list(all_linear(setting, params, problem.apply, example, exclude=problem.head).rules)  # type: ignore[arg-type]
    spec = Spec([*((p, Full()) for p in problem.head), *rules])
    plan = resolve(spec, params, problem.apply, example)
    base, factors = split(params, plan, jax.random.fold_in(jax.random.key(seed), 1))
    adapted = adapt(problem.apply, plan)
    per_epoch = steps_per_epoch or problem.facts["train"] // workload.batch_size
    schedule = optax.linear_schedule(lr, 0.0, per_epoch * epochs)

    def loss(base: Any, factors: Any, batch: Any, key: Any = None) -> Any:
        logits = adapted(base, factors, batch, dropout_key=key)
        right = correct(logits, batch.label, batch.weight) / jnp.sum(batch.weight)
        return problem.loss(logits, batch) + penalty(plan, factors), {"accuracy": right}

    init, step = make_step(loss, partition(optax.adamw(schedule), plan, clip=1.0))
    validate, test = (Evaluator(problem, base, plan.trained, part) for part in (problem.val, problem.test))

    def measure(factors: Any) -> dict[str, float]:
        found = validate(merge(base, factors, plan))
        return {"loss": found["loss"], "accuracy": found["accuracy"]}

    out.mkdir(parents=True, exist_ok=True)
    saved, log = out / "training.npz", out / "metrics.jsonl"
    if saved.exists():
        tqdm.write(f"{str(out)!r} holds an interrupted training: going on", file=sys.stderr)
    elif log.exists():
        tqdm.write(f"{str(log)!r} is of an earlier training without an adapter: beginning anew", file=sys.stderr)
        log.unlink()
    settings = {
        "problem": workload.to_dict(),
        "base": fingerprint(base, [leaf.path for leaf in plan.full]),
        "spec": spec.to_dict(),
        **{"lr": lr, "seed": seed, "steps per epoch": per_epoch},
    }
    rounds = [list(itertools.islice(stream, per_epoch)) for _ in range(epochs)]
    # Without dropout no key is drawn for a step.
    masks = jax.random.fold_in(jax.random.key(seed), 2) if any(site.dropout > 0 for site in plan.sites) else None
    state = init(factors, masks)
    fitted = fit(
        step, state, base, rounds, evaluate=measure, log=log, progress=progress, saved=saved, settings=settings
    )
    if not fitted.history:
        saved.unlink(missing_ok=True)
        raise StudyError(f"training gave no usable adapter: {fitted.stopped}.\n  lower the learning rate")
    final = test(merge(base, fitted.state.factors, plan))
    meta = {"problem": problem.name, "settings": workload.to_dict()}
    save_adapter(out / "adapter", plan, fitted.state.factors, base=base, meta=meta)
    saved.unlink(missing_ok=True)
    return {
        "adapter": str(out / "adapter"),
        "stopped": fitted.stopped,
        "history": fitted.history,
        "test_accuracy": final["accuracy"],
        "test_loss": final["loss"],
    }


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
