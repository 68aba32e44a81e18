"""Makes a trained model smaller by one method, heals it, and says what was lost and what was saved."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from tqdm import tqdm

from lorax_kit.benchmarks.timing import alternate, calling, ratio
from lorax_kit.checkpoint.fingerprint import differences, digests, fingerprint, first_difference
from lorax_kit.commands.compress.methods import (
    Small,
    finished,
    smaller,
    statistics_for,
    stored_bytes,
    students_layers,
    total_bytes,
)
from lorax_kit.commands.compress.recipe import Healing, Method, Recipe
from lorax_kit.commands.compress.subjects import Apply, Quality, Subject, subject_of
from lorax_kit.compress import Moments, compressed, distil, distillation, heal, tune
from lorax_kit.compress.arguments import check_count, check_share
from lorax_kit.core.lowrank import LowRank
from lorax_kit.core.paths import Params, flatten
from lorax_kit.core.quantised import Quantised
from lorax_kit.errors import CompressError
from lorax_kit.files.staging import refuse_existing, staged
from lorax_kit.json_text import read_json, sealed_json
from lorax_kit.measure import facts, product_flops
from lorax_kit.problems.load import with_files
from lorax_kit.serve import load_tensors, save_tensors

MODEL, ROW = "model.safetensors", "row.json"
IN_TURN = ", in turn"
"""Suffix of the method's name in a row whose layers were compressed one after the other."""


def compress_subject(
    subject: Subject,
    recipe: Recipe,
    healing: Healing | None = None,
    *,
    rounds: int = 15,
    stats: Mapping[str, Moments] | None = None,
    original: Quality | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], Small]:
    """Compress, measure, heal, measure: one row, and the model it ends with.

    Args:
      healing: None, or no steps: no healing.
      rounds: alternating rounds of latency, dense against compressed; 0 leaves latency out.
      stats, original: of earlier calls with the same subject.

    Returns:
      (row, model), the row with `subject, method, keep, seed, params, bytes, bytes_ratio` (of the targets),
      `model_bytes, model_ratio` (of the whole), `flops_ratio, latency_ms, latency_ratio, memory_ratio` (of a forward
      pass over a training batch), `metric, metric_before, metric_after, metric_healed, agreement_after,
      agreement_healed` (None where nothing was healed).

    Raises:
      CompressError: healing of what cannot be healed, what the method itself raises.
    """
    way, healing = recipe.way, healing or Healing()
    healing.check(recipe)
    check_count("rounds", rounds, 0)
    if stats is None:
        stats = statistics_for(subject, [way], recipe.batches, allocation=recipe.allocation, progress=progress)

    def say(phase: str) -> None:
        if progress:
            tqdm.write(f"{way.name}, {recipe.keep:g} kept: {phase}", file=sys.stderr)

    say("making it smaller")
    small = smaller(subject, recipe, stats, progress=progress)
    say("measuring")
    original = original or subject.quality(subject.apply, subject.params)
    final, healed = finished(subject, way, small), None
    after = subject.quality(*final, original)
    if healing.steps:
        say("healing")
        small = healed_model(subject, way, small, healing, progress=progress)
        final = finished(subject, way, small)
        healed = subject.quality(*final, original)
    if rounds:
        say("timing")
    stored, whole = stored_bytes(subject, way, final.params), total_bytes(subject.params)
    named = flatten(subject.params)[0]
    dense = sum(named[site.path].nbytes for site in subject.sites.sites)
    rest = total_bytes(final.params) - stored if way.kind == "student" else whole - dense
    row = {
        "subject": subject.name,
        "method": way.name + IN_TURN * recipe.sequential,
        "keep": recipe.keep,
        "seed": healing.seed,
        "params": _count(final.params),
        "bytes": stored,
        "bytes_ratio": stored / dense,
        "model_bytes": rest + stored,
        "model_ratio": (rest + stored) / whole,
        **_speed(subject, final, rounds),
        "metric": subject.metric.name,
        "metric_before": original.value(subject.metric.name),
        "metric_after": after.value(subject.metric.name),
        "metric_healed": None if healed is None else healed.value(subject.metric.name),
        "agreement_after": after.agreement,
        "agreement_healed": None if healed is None else healed.agreement,
    }
    return row, final


def save_small(out: str | Path, subject: Subject, row: dict[str, Any], small: Small) -> None:
    """Write a folder of `model.safetensors` (`lorax_kit.serve.load_tensors` reads it) and `row.json`, or nothing.

    Raises:
      AdapterError: the folder exists.
    """
    path = Path(out).absolute()
    refuse_existing(path, None, None)
    with staged(path, False) as folder:
        folder.mkdir()
        save_tensors(folder / MODEL, small.params)
        original = {"original": fingerprint(subject.params), "leaves": digests(subject.params)}
        of = {"of": subject.origin, "targets": list(subject.targets)}
        text = sealed_json(row | original | of, indent=2) + "\n"
        (folder / ROW).write_text(text, encoding="utf-8")


def subject_of_small(
    folder: str | Path, *, address: str | None = None, files: Mapping[str, str] | None = None
) -> Subject:
    """The model of which `save_small` wrote a smaller one.

    Args:
      address, files: of its problem and rows, as `subject_of` takes them.

    Raises:
      CompressError: a damaged folder, or one that does not say of which model it is.
    """
    path = Path(folder)
    try:
        row = read_json(path / ROW)
        of, targets = row.get("of") or {}, tuple(row.get("targets") or ())
        model, settings = of.get("model"), of.get("settings")
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise CompressError(f"{str(path)!r} is damaged: {type(e).__name__} {e}.") from None
    # An address in a file would run what it names: it comes from the caller alone.
    if isinstance(settings, Mapping) and "task" in settings and "address" not in settings:
        return subject_of(
            None, targets=targets, settings=with_files(settings, files or {}, f"the model in {str(path)!r}")
        )
    if isinstance(model, str):
        return subject_of(model, targets=targets, address=address, files=files)
    if address is None:
        raise CompressError(
            f"{str(path)!r} does not say of which problem it is.\n  give its address: --problem module:object"
        )
    return subject_of(None, targets=targets, settings=address)


def load_small(folder: str | Path, subject: Subject) -> tuple[dict[str, Any], Small]:
    """What `save_small` wrote: the row, and the model.

    Raises:
      CompressError: no such folder, a damaged one, or one made of another model than the subject's.
      AdapterError: damaged tensors.
    """
    path = Path(folder)
    try:
        row = read_json(path / ROW)
        way, keep = Method.parse(row["method"].removesuffix(IN_TURN)), float(row["keep"])
        original, leaves, _ = row["original"], row.get("leaves"), row["metric_healed"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CompressError(
            f"{str(path)!r} is no model of `lorax-kit compress --out`: {type(e).__name__} {e}."
        ) from None
    if original != fingerprint(subject.params):
        changed = differences(digests(subject.params), leaves) if isinstance(leaves, dict) else {}
        raise CompressError(
            f"the model in {str(path)!r} was made of another one than {subject.name!r}"
            + (f":\n  {first_difference(changed)}" if changed else ".")
        )
    params, (apply, expected) = load_tensors(path / MODEL), (subject.apply, subject.params)
    if way.kind == "student":
        apply, expected = subject.student(students_layers(subject, check_share("keep", keep)))
    elif way.kind not in ("pruned", "tuned"):
        apply = compressed(apply)
    if _layout(params) != _layout(expected):
        raise CompressError(f"{str(path)!r} is damaged: its tensors are not those of a {row['method']!r} model.")
    return row, Small(apply, params)


def _layout(params: Params) -> dict[str, tuple[int, ...]]:
    """Shapes by path, of compact leaves those of what they stand for."""
    return {p: tuple(x.shape) for p, x in flatten(params, whole=(LowRank, Quantised))[0].items()}


def healed_model(subject: Subject, method: Method, small: Small, healing: Healing, *, progress: bool = True) -> Small:
    """A smaller model, trained a little to do what the original does.

    The original's logits are computed beside each batch, so that its params are no constants of the step.
    """
    teacher, places = jax.jit(subject.apply), subject.problem.places

    def pairs() -> Iterator[tuple[Any, Array]]:
        for batch in subject.train(healing.seed):
            yield batch, teacher(subject.params, batch)

    loss = distillation(
        lambda pair: pair[1],
        lambda logits, pair: subject.loss(logits, pair[0]),
        weight=None if places is None else lambda pair: places(pair[0]),
        share=healing.share,
    )
    steps, lr, rank = healing.steps, healing.lr, healing.rank
    if method.kind == "student":
        apply = small.apply
        params = distil(
            lambda params, pair: apply(params, pair[0]), small.params, loss, pairs(), steps=steps,
            lr=lr if rank is None else lr / 10, progress=progress,
        )  # fmt: skip
        return Small(apply, params)

    def dense(params: Params, pair: Any) -> Any:
        return subject.apply(params, pair[0])

    key = jax.random.key(healing.seed)
    if method.kind in ("pruned", "tuned"):
        params = tune(
            dense, small.params, subject.sites, loss, pairs(), key, steps=steps, lr=lr, rank=rank,
            keep_zeros=method.kind == "pruned", progress=progress,
        )  # fmt: skip
    else:
        params = heal(dense, small.params, loss, pairs(), key, steps=steps, lr=lr, rank=rank, progress=progress)
    return Small(small.apply, params)


def _count(params: Params) -> int:
    """Entries that are stored: those that are not zero of an array, all of a quantised one."""
    leaves = flatten(params)[0].values()
    return sum(prod(x.shape) if isinstance(x, Quantised) else int(jnp.sum(x != 0)) for x in leaves)


def _speed(subject: Subject, small: Small, rounds: int) -> dict[str, Any]:
    """FLOPs, memory and time of a forward pass, compressed against dense; medians of alternating rounds."""
    batch = next(subject.train(0))
    models: dict[str, tuple[Apply, Params]] = {"dense": (subject.apply, subject.params), "small": small}
    compiled = {name: jax.jit(fn).lower(params, batch).compile() for name, (fn, params) in models.items()}
    before, after = (facts(program) for program in compiled.values())
    # Of the products, not XLA's count: that takes the body of a loop once.
    flops = {name: product_flops(fn, params, batch) for name, (fn, params) in models.items()}
    out = {
        "flops_ratio": flops["small"] / flops["dense"],
        "memory_ratio": after["peak_bytes"] / before["peak_bytes"],
        "latency_ms": None,
        "latency_ratio": None,
    }
    if rounds:
        runs = {name: calling(program, models[name][1], batch) for name, program in compiled.items()}
        times = alternate(runs, range(rounds))
        out |= {"latency_ms": median(times["small"]), "latency_ratio": ratio(times, "small", "dense").median}
    return out
