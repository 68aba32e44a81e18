"""Exports a trained model as a folder that runs without the project, and measures what was written against JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from lorax_kit.benchmarks.timing import alternate, ratio
from lorax_kit.checkpoint.adapter import adapter_bytes, read_meta
from lorax_kit.commands.compress.methods import Small, total_bytes
from lorax_kit.commands.compress.recipe import Recipe
from lorax_kit.commands.compress.subjects import Subject, subject_of
from lorax_kit.commands.export.options import Export, refuse_quantised, shrunk
from lorax_kit.core.lowrank import LowRank
from lorax_kit.core.paths import Params, flatten
from lorax_kit.errors import ExportError
from lorax_kit.files.staging import refuse_existing, staged
from lorax_kit.json_text import read_json, sealed_json
from lorax_kit.models import load_bert
from lorax_kit.problem.evaluate import scored, summarised
from lorax_kit.problems.packaged.sentiment import LABELS, adapter_folder, workload_of
from lorax_kit.serve import load_onnx, load_stablehlo, load_tensors, save_onnx, save_stablehlo, save_tensors
from lorax_kit.serve.inputs import Inputs, inputs_of
from lorax_kit.serve.onnx import check_installed
from lorax_kit.version import __version__

FILES = {"safetensors": "model.safetensors", "stablehlo": "model.stablehlo", "onnx": "model.onnx"}
"""Format -> the file that holds the model."""
DOCUMENT, VOCABULARY = "export.json", "vocab.txt"
Run = Callable[[Any], list[np.ndarray]]
"""Batch -> the model's outputs, flat."""


def export_adapter(
    adapter: str | Path,
    out: str | Path,
    export: Export,
    *,
    by: Recipe | str | Path | None = None,
    problem: str | None = None,
    files: Mapping[str, str] | None = None,
    targets: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Write the model of an adapter, merged or compressed first, and measure it on its problem's test set.

    The folder holds the model and export.json, which says what it reads and what was measured; of a classifier of texts
    the words of its tokenizer (vocab.txt), too. It appears whole or not at all; adapter and base are only read.

    Args:
      adapter: a folder of `lorax-kit train` or of a study.
      out: the folder to create.
      export: as "safetensors", "stablehlo" or "onnx".
      by: compress first, by a recipe; or a folder of `lorax-kit compress ADAPTER --out`, healed or not, in place of the
        merged model. None: the adapter is merged.
      problem: address of the problem, in place of the one that the adapter remembers.
      files: of its rows, where they lie now; see `lorax_kit.problems.load.problem_of`.
      targets: patterns of the parameters that a recipe compresses.

    Returns:
      `format, method, keep, healed, int8, path, files` (name -> bytes), `file, bytes` (of the model), `sizes` (input ->
      sizes, those that may vary by name), `adapter_bytes` (on disk), `base_bytes`, `params_bytes` (of what was
      exported), `metric` (the problem's), `max_difference` (of outputs, over the test set), `METRIC_merged` (before
      compression), `METRIC_jax, METRIC, agreement` (where the problem has places), `examples`, `batch` (shape of the
      first input), `latency_jax_ms, latency_ms, latency_ratio`.

    Raises:
      ExportError: an unknown format, what the writers of `lorax_kit.serve` raise.
      AdapterError: no adapter; `out` exists.
      CompressError: what compression raises.
    """
    path, form = Path(out).absolute(), export.form
    _check(path, export)
    adapter = adapter_folder(adapter)
    subject = subject_of(adapter, targets=targets, address=problem, files=files)
    model, made = shrunk(subject, by, progress=progress)
    if export.int8:
        refuse_quantised(model.params)
    about, texts = _texts(adapter, subject.problem.facts, model.params)
    inputs = inputs_of(model.apply, model.params, subject.test[0])
    document = {
        "lorax_kit": __version__,
        "problem": subject.problem.name,
        "format": form,
        "file": FILES[form],
        "inputs": list(inputs.shapes),
        "sizes": inputs.sizes(),
        **about,
    }
    with staged(path, export.overwrite) as new:
        new.mkdir()
        run = _write(new / FILES[form], export, model, inputs)
        measured = _measured(subject, model, inputs, run, export.rounds)
        row = {
            "format": form,
            **made,
            "int8": export.int8,
            "file": FILES[form],
            "sizes": inputs.sizes(),
            "bytes": (new / FILES[form]).stat().st_size,
            "adapter_bytes": adapter_bytes(adapter),
            "base_bytes": total_bytes(subject.params),
            "params_bytes": total_bytes(model.params),
            **measured,
        }
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        (new / DOCUMENT).write_text(sealed_json(document | {"measured": row}, indent=2) + "\n", encoding="utf-8")
        sizes = {file.name: file.stat().st_size for file in sorted(new.iterdir())}
    return {**row, "path": str(path), "files": sizes}


def _check(path: Path, export: Export) -> None:
    """Raise for a format that cannot be written, or measured here, and for a folder that is not to be replaced."""
    form, platforms = export.form, export.platforms
    if form not in FILES:
        raise ExportError(f"format {form!r} is unknown; choose from {', '.join(FILES)}.")
    if form == "onnx":
        check_installed()
    here = {"gpu": {"cuda", "rocm"}}.get(jax.default_backend(), {jax.default_backend()})
    if form == "stablehlo" and not here & set(platforms):
        raise ExportError(
            f"this machine runs {' or '.join(sorted(here))}, and the platforms are {', '.join(platforms)}: "
            "what is written could not be measured here.\n  add this machine's platform to them"
        )
    refuse_existing(path, export.overwrite, DOCUMENT, "export")
    ours = {*FILES.values(), VOCABULARY, DOCUMENT}
    if path.is_dir() and (other := sorted(p.name for p in path.iterdir() if p.name not in ours or p.is_dir())):
        raise ExportError(f"{str(path)!r} holds {other[0]!r}, too, which is no part of an export: it is not replaced.")


def _write(file: Path, export: Export, model: Small, inputs: Inputs) -> Run:
    """Write one format; what is on disk then, as a function."""
    if export.form == "safetensors":
        save_tensors(file, model.params)
        loaded, apply = load_tensors(file), jax.jit(model.apply)
        return lambda batch: jax.device_get(jax.tree.leaves(apply(loaded, batch)))
    if export.form == "stablehlo":
        save_stablehlo(file, inputs.fn, model.params, inputs.shapes, platforms=export.platforms)
        exported = load_stablehlo(file)
        return lambda batch: jax.device_get(exported(*inputs.of(batch)))
    held = flatten(model.params, whole=(LowRank,))[0].values()
    options = {"int8": export.int8, "blocks": export.int8 and any(isinstance(x, LowRank) for x in held)}
    save_onnx(file, inputs.fn, model.params, inputs.shapes, outputs=_outputs(model, inputs), **options)
    session = load_onnx(file)
    return lambda batch: session(*inputs.of(batch))


def _outputs(model: Small, inputs: Inputs) -> tuple[str, ...]:
    """Names of the outputs: "logits" of one, or each by its path."""
    paths, _ = jax.tree_util.tree_flatten_with_path(jax.eval_shape(inputs.fn, model.params, *inputs.shapes.values()))
    names = [jax.tree_util.keystr(path, simple=True, separator="_") for path, _ in paths]
    names = ["logits"] if names == [""] else names
    return tuple(f"output_{name}" if name in inputs.shapes else name for name in names)


def _measured(subject: Subject, model: Small, inputs: Inputs, run: Run, rounds: int) -> dict[str, Any]:
    """The exported model against JAX, over every held-out batch."""
    problem, in_jax, difference, agreed = subject.problem, jax.jit(model.apply), 0.0, np.zeros(2)
    score = jax.jit(lambda outputs, batch: scored(problem, outputs, batch))
    parts: dict[str, list[Any]] = {"ours": [], "theirs": []}
    for batch in subject.test:
        whole = jax.device_get(in_jax(model.params, batch))
        ours, treedef = jax.tree.flatten(whole)
        theirs = [np.asarray(x).astype(y.dtype) for x, y in zip(run(batch), ours, strict=True)]
        for name, outputs in (("ours", whole), ("theirs", jax.tree.unflatten(treedef, theirs))):
            parts[name].append(jax.device_get(score(outputs, batch)))
        weight = None if problem.places is None else np.asarray(problem.places(batch))
        for x, y in zip(ours, theirs, strict=True):
            counted = ... if weight is None or x.shape[: weight.ndim] != weight.shape else weight > 0
            difference = max(difference, _difference(x[counted], y[counted]))
        if weight is not None:
            same = ours[0].argmax(-1) == theirs[0].argmax(-1)
            agreed += [float(np.sum(same * weight)), float(np.sum(weight))]
    summaries = {name: summarised(problem, some, subject.test) for name, some in parts.items()}
    metric = subject.metric.name
    out = {
        "metric": metric,
        "max_difference": difference,
        f"{metric}_merged": subject.quality(subject.apply, subject.params).value(metric),
        f"{metric}_jax": summaries["ours"][metric],
        metric: summaries["theirs"][metric],
        "agreement": None if problem.places is None else agreed[0] / agreed[1],
        "examples": summaries["ours"]["examples"],
        "batch": list(inputs.of(subject.test[0])[0].shape),
        "latency_jax_ms": None,
        "latency_ms": None,
        "latency_ratio": None,
    }
    if rounds:
        batch = subject.test[0]
        runs = {"jax": lambda: jax.device_get(in_jax(model.params, batch)), "exported": lambda: run(batch)}
        times = alternate(runs, range(rounds))
        out |= {"latency_jax_ms": median(times["jax"]), "latency_ms": median(times["exported"])}
        out |= {"latency_ratio": ratio(times, "exported", "jax").median}
    return out


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of an output; what is infinite or no number must be so in both.

    Raises:
      ExportError: it is not.
    """
    one, other = ours.astype(np.float64), theirs.astype(np.float64)
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    if not (same | (np.isfinite(one) & np.isfinite(other))).all():
        raise ExportError("the exported model gives values that are not finite, for real inputs, where JAX's are.")
    return float(np.abs(np.where(same, 0.0, one) - np.where(same, 0.0, other)).max(initial=0.0))


def _texts(adapter: Path, facts: Mapping[str, Any], params: Params) -> tuple[dict[str, Any], dict[str, str]]:
    """(what export.json says of texts, files by name): of a classifier of texts its tokenizer and labels."""
    meta = read_meta(adapter)
    if meta.get("problem") not in ("sentiment", "classify") or meta.get("address"):
        return {}, {}
    if meta["problem"] == "sentiment":
        workload = workload_of(adapter)
        model, labels, longest = workload.model, LABELS, max(*workload.buckets, workload.length or 0)
    else:
        model, labels, longest = meta["settings"].get("model", "minilm"), facts["labels"], facts["length"]
    pretrained = load_bert(model)
    words, normaliser = _vocabulary(pretrained.tokenizer_file)
    about = {
        "labels": labels,
        "max_length": longest,
        "tokenizer": normaliser,
        "encoder": asdict(pretrained.config) | {"num_hidden_layers": _layers(params)},
    }
    return about, {VOCABULARY: "\n".join(words) + "\n"}


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
