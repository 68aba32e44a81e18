"""Compresses a trained model by one method, heals it, and says what was lost and what was saved."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.benchmarks.timing import alternate, calling, facts
from lorax_kit.checkpoint.adapter import load_adapter
from lorax_kit.compress import (
    METHODS,
    PRUNINGS,
    Moments,
    calibrate,
    compress,
    compressed,
    distillation,
    heal,
    plan_ranks,
    prune,
)
from lorax_kit.core.compact import METHODS as QUANTISATIONS
from lorax_kit.core.errors import CompressError
from lorax_kit.core.merge import merge
from lorax_kit.core.paths import Params, flatten
from lorax_kit.core.plan import Plan
from lorax_kit.core.quantise import quantise
from lorax_kit.core.spec import LoRA, Spec
from lorax_kit.training.evaluate import mean_scores
from lorax_kit.transform import resolve
from lorax_kit.workloads.sentiment import workload_of

Apply = Callable[[Params, Any], Any]
ALL_METHODS = (
    *METHODS,
    *(f"{m}+{q}" for m in METHODS for q in QUANTISATIONS),
    *(*PRUNINGS, "magnitude-2:4", "wanda-2:4"),
    *QUANTISATIONS,
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained model with what compressing it needs.

    Attributes:
      name: of model and data.
      params, apply: `apply(params, batch)`, logits.
      targets: patterns of the parameters to compress.
      loss: `loss(logits, batch)`, a scalar.
      weight: batch -> how much each row of the logits counts.
      train: an endless stream of batches from a seed.
      evaluate: `(apply, params) -> metric` over held-out data.
      metric: its name.
    """

    name: str
    params: Params
    apply: Apply
    targets: tuple[str, ...]
    loss: Callable[[Any, Any], Array]
    weight: Callable[[Any], Array]
    train: Callable[[int], Iterator[Any]]
    evaluate: Callable[[Apply, Params], float]
    metric: str

    def sites(self) -> Plan:
        """The targets, resolved."""
        spec = Spec(dict.fromkeys(self.targets, LoRA(rank=1)))
        return resolve(spec, self.params, self.apply, next(self.train(0)))


LINEARS = ("encoder/layer_*/**/kernel",)


def sentiment_subject(
    adapter: str | Path, *, targets: Sequence[str] = LINEARS, batch_size: int = 32, length: int = 64
) -> Subject:
    """The classifier that an adapter of `lorax-kit train` or of a study makes of its base.

    Args:
      targets: patterns of the parameters to compress.
      batch_size, length: of calibration and healing batches.

    Raises:
      AdapterError: no adapter, or one that names no problem known here.
    """
    problem = replace(workload_of(adapter), batch_size=batch_size, length=length).build()
    base = problem.params(jax.random.key(0))
    loaded = load_adapter(adapter, base=base)

    def evaluate(apply: Apply, params: Params) -> float:
        score = jax.jit(lambda params, batch: problem.score(apply(params, batch), batch))
        return mean_scores([score(params, batch) for batch in problem.test])["accuracy"]

    return Subject(
        name=problem.facts["name"],
        params=merge(base, loaded.factors, loaded.plan),
        apply=problem.apply,
        targets=tuple(targets),
        loss=problem.loss,
        weight=lambda batch: batch.weight,
        train=lambda seed: problem.train(seed, 0),
        evaluate=evaluate,
        metric="accuracy",
    )


def statistics_of(
    subject: Subject, sites: Plan, batches: int, *, fisher: bool = True, progress: bool = True
) -> dict[str, Moments]:
    """Moments over the first batches of the training stream; with `fisher`, of the loss's gradients, too."""
    stream = itertools.islice(subject.train(0), batches)
    loss = subject.loss if fisher else None
    return calibrate(subject.apply, subject.params, sites, stream, loss=loss, progress=progress)


def compressed_params(
    subject: Subject, method: str, keep: float, sites: Plan, stats: dict[str, Moments] | None, allocation: str = "loss"
) -> tuple[Params, int]:
    """Params by one of ALL_METHODS, and the bytes in which their targets can be stored.

    Low-rank and quantised leaves count as they are kept; zeros of pruning in a bitmap of one bit per entry beside the
    values (two per kept value for 2:4), which is how sparse formats for such shares store them.

    Raises:
      CompressError: an unknown method, or what `plan_ranks`, `compress` and `prune` raise.
    """
    _check_method(method)
    lowrank, _, bits = method.partition("+")
    paths = [site.path for site in sites.sites]
    if method in QUANTISATIONS:
        small = quantise(subject.params, paths, method)
    elif lowrank in METHODS:
        plan = plan_ranks(subject.params, sites, keep=keep, method=lowrank, stats=stats, allocation=allocation)
        small = compress(subject.params, plan, stats)
        if bits:
            factors = [f"{s.path}/{side}" for s, rank in plan.chosen() if rank is not None for side in "ab"]
            whole = [s.path for s, rank in plan.chosen() if rank is None]
            small = quantise(small, [*factors, *whole], bits)
    else:
        kind, _, pattern = method.partition("-")
        pattern = pattern or "unstructured"
        small = prune(subject.params, sites, keep=keep, method=kind, stats=stats, pattern=pattern)
        named = flatten(small)[0]
        entries = sum(named[p].size for p in paths)
        kept = sum(int(jnp.sum(named[p] != 0)) for p in paths)
        return small, 4 * kept + (kept // 4 if pattern == "2:4" else entries // 8)
    named = flatten(small)[0]
    return small, sum(x.nbytes for p, x in named.items() if any(p == own or p.startswith(f"{own}/") for own in paths))


def compress_subject(
    subject: Subject,
    *,
    method: str,
    keep: float,
    batches: int = 16,
    steps: int = 0,
    lr: float = 1e-3,
    rank: int | None = 8,
    share: float = 0.5,
    allocation: str = "loss",
    rounds: int = 15,
    seed: int = 0,
    stats: dict[str, Moments] | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], Params]:
    """Compress, measure, heal, measure: one row, and the params it ends with.

    Args:
      keep: share of the targets' parameters (of each one's entries when pruning; quantising keeps all).
      batches: of calibration.
      steps, lr, rank, share: of healing; no steps, no healing. Only low-rank params are healed.
      rounds: alternating rounds of latency, dense against compressed.
      stats: of an earlier call with the same subject.

    Returns:
      (row, params), the row with `subject, method, keep, params, bytes, bytes_ratio` (of the targets), `model_bytes,
      model_ratio` (of the whole), `flops_ratio, latency_ms, latency_ratio, memory_ratio` (of a forward pass over a
      training batch), `metric, metric_before, metric_after, metric_healed` (None where nothing was healed).
    """
    _check_method(method)
    if steps and method.partition("+")[0] not in METHODS:
        raise CompressError(f"{method!r} leaves nothing low-rank to heal.\n  heal svd, fisher, asvd or whitened")
    sites = subject.sites()
    needs = not method.startswith((*QUANTISATIONS, "svd", "magnitude"))
    if needs and stats is None:
        stats = statistics_of(subject, sites, batches, fisher=method.startswith("fisher"), progress=progress)
    small, stored = compressed_params(subject, method, keep, sites, stats, allocation)
    fn = compressed(subject.apply)
    before, after, healed = subject.evaluate(subject.apply, subject.params), subject.evaluate(fn, small), None
    if steps:
        teacher = jax.jit(lambda batch: subject.apply(subject.params, batch))
        loss = distillation(teacher, subject.loss, weight=subject.weight, share=share)
        key = jax.random.key(seed)
        small = heal(subject.apply, small, loss, subject.train(seed), key, steps=steps, lr=lr, rank=rank,
                     progress=progress)  # fmt: skip
        healed = subject.evaluate(fn, small)
    dense = sum(int(np.prod(site.shape)) for site in sites.sites)
    whole = _bytes(subject.params)
    row = {
        "subject": subject.name,
        "method": method,
        "keep": keep,
        "params": _count(small),
        "bytes": stored,
        "bytes_ratio": stored / (4 * dense),
        "model_bytes": whole - 4 * dense + stored,
        "model_ratio": (whole - 4 * dense + stored) / whole,
        **_speed(subject.apply, subject.params, fn, small, next(subject.train(0)), rounds),
        "metric": subject.metric,
        "metric_before": before,
        "metric_after": after,
        "metric_healed": healed,
    }
    return row, small


def _check_method(method: str) -> None:
    if method not in ALL_METHODS:
        raise CompressError(f"method {method!r} is unknown; choose from {', '.join(ALL_METHODS)}.")


def _count(params: Params) -> int:
    """Numbers that are stored and not zero."""
    return sum(int(jnp.sum(x != 0)) for x in jax.tree.leaves(params))


def _bytes(params: Params) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(params))


def _speed(dense: Apply, params: Params, fn: Apply, small: Params, batch: Any, rounds: int) -> dict[str, Any]:
    """FLOPs, memory and time of a forward pass, compressed against dense; medians of alternating rounds."""
    values = {"dense": (params, batch), "small": (small, batch)}
    compiled = {name: jax.jit(f).lower(*values[name]).compile() for name, f in (("dense", dense), ("small", fn))}
    before, after = (facts(program) for program in compiled.values())
    times = alternate({name: calling(program, *values[name]) for name, program in compiled.items()}, range(rounds))
    ratios: Sequence[float] = [a / b for a, b in zip(times["small"], times["dense"], strict=True)]
    return {
        "flops_ratio": after["flops"] / before["flops"],
        "latency_ms": median(times["small"]),
        "latency_ratio": median(ratios),
        "memory_ratio": after["peak_bytes"] / before["peak_bytes"],
    }
