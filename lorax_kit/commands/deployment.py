"""Exports a trained classifier as a folder that runs without the project, and measures what was written against JAX."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.export
import numpy as np

from lorax_kit.benchmarks.timing import alternate, ratio
from lorax_kit.checkpoint.adapter import adapter_bytes
from lorax_kit.checkpoint.staging import refuse_existing, staged
from lorax_kit.commands.compression import load_small
from lorax_kit.commands.methods import Method, Small, finished, smaller, statistics_for, total_bytes
from lorax_kit.commands.subjects import Subject, sentiment_subject
from lorax_kit.compress.arguments import check_share
from lorax_kit.core.paths import flatten
from lorax_kit.core.quantised import Quantised
from lorax_kit.errors import ExportError
from lorax_kit.json_text import read_json
from lorax_kit.models import load_bert
from lorax_kit.serve import load_onnx, load_stablehlo, load_tensors, save_onnx, save_stablehlo, save_tensors
from lorax_kit.serve.onnx import check_installed
from lorax_kit.tasks import Batch
from lorax_kit.version import __version__
from lorax_kit.workloads.sentiment import adapter_folder, workload_of

FILES = {"safetensors": "model.safetensors", "stablehlo": "model.stablehlo", "onnx": "model.onnx"}
"""Format -> the file that holds the model."""
LABELS = ("negative", "positive")
DOCUMENT, VOCABULARY = "export.json", "vocab.txt"
Run = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(ids, mask) (B, T) -> logits (B, C)."""


def export_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    form: str,
    method: str | None = None,
    keep: float = 0.5,
    targets: Sequence[str] = (),
    batches: int = 16,
    compressed: str | Path | None = None,
    int8: bool = False,
    platforms: Sequence[str] = ("cpu",),
    rounds: int = 15,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the classifier of an adapter, merged or compressed first, and measure it on its test reviews.

    The folder holds the model, the words of the tokenizer (vocab.txt) and export.json, which says how to use them and
    what was measured. It appears whole or not at all; adapter and base are only read.

    Args:
      adapter: a folder of `lorax-kit train` or of a study.
      out: the folder to create.
      form: "safetensors", "stablehlo" or "onnx".
      method, keep, targets, batches: compress first, as `compress_subject` takes them; without a method the adapter
        is merged.
      compressed: instead, a folder of `lorax-kit compress ADAPTER --out`, healed or not.
      int8: quantise the ONNX model.
      platforms: that StableHLO is lowered for.
      rounds: alternating rounds of latency, JAX against the exported model; 0 leaves latency out.
      overwrite: replace an earlier export; otherwise it is an error.

    Returns:
      `format, method, keep, healed, int8, path, files` (name -> bytes), `file, bytes` (of the model), `adapter_bytes`
      (on disk), `base_bytes` (fp32), `params_bytes` (of what was exported), `max_difference` (of logits, over all test
      reviews), `accuracy_merged` (before compression), `accuracy_jax, accuracy, agreement, examples`, `batch` (shape),
      `latency_jax_ms, latency_ms, latency_ratio`.

    Raises:
      ExportError: an unknown format, int8 of another format, what the writers of `lorax_kit.serve` raise.
      AdapterError: no adapter; `out` exists.
      CompressError: what compression raises.
    """
    path = Path(out).absolute()
    if form not in FILES:
        raise ExportError(f"format {form!r} is unknown; choose from {', '.join(FILES)}.")
    if int8 and form != "onnx":
        raise ExportError(f"int8 is a form of onnx, not of {form}.\n  compress first by method int8")
    if compressed is not None and method is not None:
        raise ExportError("a model that is compressed already takes no method: give one of the two.")
    if form == "onnx":
        check_installed()
    here = {"gpu": {"cuda", "rocm"}}.get(jax.default_backend(), {jax.default_backend()})
    if form == "stablehlo" and not here & set(platforms):
        raise ExportError(
            f"this machine runs {' or '.join(sorted(here))}, and the platforms are {', '.join(platforms)}: "
            "what is written could not be measured here.\n  add this machine's platform to them"
        )
    refuse_existing(path, overwrite, DOCUMENT, "export")
    if path.is_dir() and (other := sorted({p.name for p in path.iterdir()} - {*FILES.values(), VOCABULARY, DOCUMENT})):
        raise ExportError(f"{str(path)!r} holds {other[0]!r}, too, which is no part of an export: it is not replaced.")
    adapter = adapter_folder(adapter)
    workload = workload_of(adapter)
    pretrained = load_bert(workload.model)
    words, normaliser = _vocabulary(pretrained.tokenizer_file)
    subject = sentiment_subject(adapter, targets=targets)
    model, healed = Small(subject.apply, subject.params), False
    if compressed is not None:
        kept, model = load_small(compressed, subject)
        method, keep, healed = kept["method"], kept["keep"], kept["metric_healed"] is not None
    elif method is not None:
        keep = 1.0 if Method.parse(method).kind == "quantised" else check_share("keep", keep)
        model = _compressed(subject, Method.parse(method), keep, batches, progress)
    if int8 and any(isinstance(x, Quantised) for x in flatten(model.params)[0].values()):
        raise ExportError("int8 quantises float params, and these are quantised already.\n  leave int8 out")
    document = {
        "lorax_kit": __version__,
        "format": form,
        "file": FILES[form],
        "labels": LABELS,
        "inputs": ["ids", "mask"],
        "max_length": max(*workload.buckets, workload.length or 0),
        "tokenizer": normaliser,
        "encoder": asdict(pretrained.config) | {"num_hidden_layers": _layers(model.params)},
    }
    with staged(path, overwrite) as new:
        new.mkdir()
        run = _write(new / FILES[form], form, model, int8, platforms)
        measured = _measured(subject, model, run, rounds)
        row = {
            "format": form,
            "method": method,
            "keep": keep if method is not None else None,
            "healed": healed,
            "int8": int8,
            "file": FILES[form],
            "bytes": (new / FILES[form]).stat().st_size,
            "adapter_bytes": adapter_bytes(adapter),
            "base_bytes": total_bytes(subject.params),
            "params_bytes": total_bytes(model.params),
            **measured,
        }
        (new / VOCABULARY).write_text("\n".join(words) + "\n", encoding="utf-8")
        (new / DOCUMENT).write_text(json.dumps(document | {"measured": row}, indent=2) + "\n", encoding="utf-8")
        files = {file.name: file.stat().st_size for file in sorted(new.iterdir())}
    return {**row, "path": str(path), "files": files}


def _compressed(subject: Subject, method: Method, keep: float, batches: int, progress: bool) -> Small:
    stats = statistics_for(subject, [method], batches, progress=progress)
    return finished(subject, method, smaller(subject, method, keep, stats, progress=progress))


def _write(file: Path, form: str, model: Small, int8: bool, platforms: Sequence[str]) -> Run:
    """Write one format; what is on disk then, as a function."""
    if form == "safetensors":
        save_tensors(file, model.params)
        loaded, apply = load_tensors(file), jax.jit(lambda params, ids, mask: model.apply(params, _batch(ids, mask)))
        return lambda ids, mask: np.asarray(apply(loaded, ids, mask))

    def fn(params: Any, ids: Any, mask: Any) -> Any:
        return model.apply(params, _batch(ids, mask))

    shape = jax.ShapeDtypeStruct((1, 2), np.int32)
    inputs: Mapping[str, Any] = jax.export.symbolic_args_specs({"ids": shape, "mask": shape}, "batch, length")
    if form == "stablehlo":
        save_stablehlo(file, fn, model.params, inputs, platforms=platforms)
        exported = load_stablehlo(file)
        return lambda ids, mask: np.asarray(exported(ids, mask)[0])
    save_onnx(file, fn, model.params, inputs, outputs=("logits",), int8=int8)
    session = load_onnx(file)
    return lambda ids, mask: session(ids, mask)[0]


def _batch(ids: Any, mask: Any) -> Batch:
    """Of what the classifier reads; labels and weights are not its inputs."""
    return Batch(ids, mask, None, None)  # type: ignore[arg-type]


def _measured(subject: Subject, model: Small, run: Run, rounds: int) -> dict[str, Any]:
    """The exported model against JAX, over every held-out batch."""
    in_jax = jax.jit(lambda params, ids, mask: model.apply(params, _batch(ids, mask)))
    difference, sums = 0.0, np.zeros(4)
    for batch in subject.test:
        label, weight = np.asarray(batch.label), np.asarray(batch.weight)
        ours, theirs = np.asarray(in_jax(model.params, batch.ids, batch.mask)), run(batch.ids, batch.mask)
        if not np.isfinite(theirs).all():
            raise ExportError("the exported model gives values that are not finite for real inputs.")
        difference = max(difference, float(np.abs(ours - theirs)[weight > 0].max()))
        chosen = ours.argmax(-1), theirs.argmax(-1)
        right = (chosen[0] == label, chosen[1] == label, chosen[0] == chosen[1], np.ones_like(weight))
        sums += [float(np.sum(x * weight)) for x in right]
    examples = sums[3]
    out = {
        "max_difference": difference,
        "accuracy_merged": subject.quality(subject.apply, subject.params).value("accuracy"),
        "accuracy_jax": sums[0] / examples,
        "accuracy": sums[1] / examples,
        "agreement": sums[2] / examples,
        "examples": int(examples),
        "batch": list(subject.test[0].ids.shape),
        "latency_jax_ms": None,
        "latency_ms": None,
        "latency_ratio": None,
    }
    if rounds:
        ids, mask = subject.test[0].ids, subject.test[0].mask
        runs = {"jax": lambda: np.asarray(in_jax(model.params, ids, mask)), "exported": lambda: run(ids, mask)}
        times = alternate(runs, range(rounds))
        out |= {"latency_jax_ms": median(times["jax"]), "latency_ms": median(times["exported"])}
        out |= {"latency_ratio": ratio(times, "exported", "jax").median}
    return out


def _layers(params: Any) -> int:
    """A student has fewer than its teacher."""
    return sum(name.startswith("layer_") for name in params["encoder"])


def _vocabulary(file: Path) -> tuple[list[str], dict[str, Any]]:
    """Of a BERT tokenizer.json: words by id, and what happens to a text before it is split.

    Raises:
      ExportError: another kind of tokenizer, whose words alone would not say how texts are split.
    """
    data = read_json(file)
    kind, normaliser = data["model"].get("type"), data.get("normalizer") or {}
    if kind != "WordPiece" or normaliser.get("type") != "BertNormalizer":
        raise ExportError(
            f"{str(file)!r} is a {kind} tokenizer with {normaliser.get('type')}; only BERT's WordPiece is exported."
        )
    vocabulary: dict[str, int] = data["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[word] for word in words] != list(range(len(words))):
        raise ExportError(f"{str(file)!r} leaves out ids: a list of its words cannot tell them.")
    settings = {name: normaliser.get(name) for name in ("lowercase", "strip_accents", "handle_chinese_chars")}
    return words, {"vocabulary": VOCABULARY, **settings}
