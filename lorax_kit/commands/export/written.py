"""Exports a model that writes, its cache included, as a folder that runs without the project, and measures it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorax_kit.checkpoint.adapter import adapter_bytes, read_meta
from lorax_kit.checkpoint.tensors import write_tensors
from lorax_kit.commands.adapters.generation import Author, Origin, origin_of
from lorax_kit.commands.compress.methods import total_bytes
from lorax_kit.commands.compress.recipe import STUDENT, Recipe
from lorax_kit.commands.compress.subjects import subject_of
from lorax_kit.commands.export.measured import SENTENCES, Sample, measured, samples_of
from lorax_kit.commands.export.options import Export, refuse_quantised, shrunk
from lorax_kit.core.merge import merge
from lorax_kit.core.method import update_of
from lorax_kit.core.paths import Params, flatten
from lorax_kit.core.quantised import Quantised
from lorax_kit.errors import ExportError
from lorax_kit.files.staging import refuse_existing, staged
from lorax_kit.generate import Writer, decoder_of
from lorax_kit.generate.exported import WEIGHTS, adapter_arrays, described, load_parts, one_at_a_time, save_parts
from lorax_kit.generate.programs import Part, parts_of, with_factors
from lorax_kit.json_text import read_json, sealed_json
from lorax_kit.problem.base import cast
from lorax_kit.problems import problem_of
from lorax_kit.problems.packaged.sentiment import adapter_folder
from lorax_kit.serve import litert, onnx
from lorax_kit.version import __version__

FORMATS = ("onnx", "stablehlo", "litert")
DOCUMENT, TOKENIZER, ADAPTERS = "export.json", "tokenizer.json", "adapters"
TASKS = ("lm", "language", "chat", "translate", "plays")
"""Problems whose adapters are of models that write."""
_MARK = "\u2063text\u2063"
"""Stands for a user's text while a prompt is laid out."""


def writes(adapter: str | Path) -> bool:
    """Whether the folder is of an adapter of a model that writes, on a problem known by name."""
    path = adapter_folder(adapter)
    if not (path / "spec").is_dir():
        return False
    meta = read_meta(path)
    return meta.get("problem") in TASKS and not meta.get("address")


def export_writer(
    source: str | Path,
    out: str | Path,
    export: Export,
    *,
    separate: bool = False,
    slots: int = 256,
    params: Params = None,
    texts: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
    new: int = 16,
) -> dict[str, Any]:
    """Write a model that writes as programs, its tokenizer and how prompts are laid out, and measure what was written.

    Args:
      source: an adapter of a language, chat or translation task, or what `load_model` takes.
      out: folder to create: decoder.onnx, .stablehlo or .tflite (of an encoder-decoder encoder.* and weights.bin, too),
        tokenizer.json, export.json, and with `separate` adapters/NAME.safetensors.
      export: as "onnx", "stablehlo" or "litert".
      separate: the programs hold the base alone, and an adapter's factors are inputs: one base serves many adapters.
        False: the adapter is merged.
      slots: of LiteRT, tokens of the longest text.
      params: other params of the same model, compressed ones among them, in place of the merged; None: those.
      texts: to measure on; default: the test rows of an adapter's problem, else twenty sentences.
      files: of an adapter's rows, where they lie now; see `lorax_kit.problems.load.problem_of`.
      new: tokens to write after each prompt while measuring.

    Returns:
      `format, int8, separate, path, files` (name -> bytes), `bytes` (of programs and weights), `sizes` (of the
      decoder's inputs), `adapter_bytes`, `params_bytes`, and of `measured`: `prompts, tokens, tokens_equal,
      perplexity_jax, perplexity, perplexity_ratio, max_difference, latency_jax_ms, latency_ms, latency_ratio`.

    Raises:
      ExportError: an unknown format, `separate` without an adapter or with one that is no sum of products, what the
        writers raise.
      AdapterError, LoraxError: as `origin_of`; `out` exists.
    """
    path, form = Path(out).absolute(), export.form
    _check(path, export, separate)
    origin = origin_of(source)
    _check_origin(origin, params, int8=export.int8, separate=separate)
    whole = cast(params if params is not None else _merged(origin), "float32")
    parts = parts_of(origin.loaded, grows=form == "onnx")
    stored, parts, arrays = _apart(origin, parts) if separate else (whole, parts, {})
    name = Path(source).resolve().name
    author = Author(
        origin.loaded, Writer(decoder_of(origin.loaded), origin.loaded.tokenizer), whole, asking=origin.asking
    )
    longest = origin.loaded.positions
    if form == "litert":
        longest = min(slots, longest or slots)
        parts = one_at_a_time(parts, longest)
    samples = _samples(origin, source, author, texts, longest, files)
    with staged(path, export.overwrite) as folder:
        folder.mkdir()
        files = save_parts(folder, parts, stored, form, int8=export.int8, platforms=export.platforms)
        size = sum(file.stat().st_size for file in folder.iterdir())
        origin.loaded.tokenizer.save(folder / TOKENIZER)
        if separate:
            (folder / ADAPTERS).mkdir()
            write_tensors(folder / ADAPTERS / f"{name}.safetensors", arrays, {})
        runner = load_parts(folder, parts, files, origin.loaded, arrays)
        row = {
            "format": form,
            "int8": export.int8,
            "separate": separate,
            "bytes": size,
            "sizes": {
                name: [str(n) for n in x.shape] for name, x in parts[-1].inputs.items() if name in ("ids", "seen")
            },
            "adapter_bytes": None if origin.adapter is None else adapter_bytes(adapter_folder(source)),
            "params_bytes": total_bytes(stored),
            **measured(author, runner, samples, longest=longest, new=new, rounds=export.rounds),
        }
        document = {
            "lorax_kit": __version__,
            "format": form,
            "writes": origin.loaded.kind,
            "parts": described(parts, files),
        }
        document |= _about(author, longest) | {"adapters": [name] if separate else [], "measured": row}
        (folder / DOCUMENT).write_text(sealed_json(document, indent=2) + "\n", encoding="utf-8")
        sizes = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    return {**row, "path": str(path), "files": sizes}


def _check(path: Path, export: Export, separate: bool) -> None:
    """Raise for a format that cannot be written, and for a folder that is not to be replaced."""
    form = export.form
    if form not in FORMATS:
        raise ExportError(f"format {form!r} is none of a model that writes; choose from {', '.join(FORMATS)}.")
    if separate and form == "litert":
        raise ExportError("LiteRT has one size of everything: an adapter of any rank goes with onnx or stablehlo.")
    for name, check in (("onnx", onnx.check_installed), ("litert", litert.check_installed)):
        if form == name:
            check()
    refuse_existing(path, export.overwrite, DOCUMENT, "export")
    _refuse_others(path)


def _check_origin(origin: Origin, params: Params, *, int8: bool, separate: bool) -> None:
    """Raise for factors that cannot be apart from the programs, and for weights of few bits to be quantised."""
    if separate and (origin.adapter is None or params is not None):
        raise ExportError(
            "adapters are separate of an adapter that is not merged or compressed: give an ADAPTER alone."
        )
    if int8:
        refuse_quantised(params)


def smaller_writer(
    source: str | Path,
    by: Recipe | str | Path,
    *,
    targets: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
) -> Params:
    """The params of a model that writes, made smaller by a recipe, or by `lorax-kit compress --out` before.

    Raises:
      ExportError: a method that makes another model (a student).
      CompressError: what compression raises.
    """
    model, made = shrunk(subject_of(source, targets=targets, files=files), by)
    if made["method"] == STUDENT:
        raise ExportError("a student is another model than its teacher: it is not exported to write.")
    return model.params


def add_adapter(source: str | Path, onto: str | Path, *, name: str | None = None, overwrite: bool = False) -> Path:
    """Write the factors of one more adapter for an exported base, of the same sites or fewer, of any rank.

    Args:
      source: the adapter.
      onto: a folder of `export_writer` with `separate`.
      name: of its file; default: that of the adapter's folder.

    Returns:
      The file, adapters/NAME.safetensors in the folder.

    Raises:
      ExportError: no such folder; an adapter of another model, or of a site that the base has no inputs for.
      AdapterError: the file exists.
    """
    folder, origin = Path(onto), origin_of(source)
    try:
        document = read_json(folder / DOCUMENT)
        kept = [part["inputs"] for part in document["parts"].values()]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ExportError(f"{str(folder)!r} is no export of a model that writes: {type(e).__name__} {e}.") from None
    inputs = {name: x["shape"] for part in kept for name, x in part.items() if "/" in name}
    if not inputs:
        raise ExportError(f"the programs in {str(folder)!r} take no adapters.\n  export them with --adapters separate")
    if origin.adapter is None:
        raise ExportError(f"{str(source)!r} is no adapter.")
    factors = products_of(origin)
    for path, pair in factors.items():
        for end, x in zip("ab", pair, strict=True):
            wanted = inputs.get(f"{path}/{end}")
            if wanted is None or wanted[1:] != list(x.shape[1:]):
                here = "no such input" if wanted is None else str(wanted[1:])
                raise ExportError(
                    f"{path!r} of the adapter has {end} of {list(x.shape[1:])}, and the programs have {here}: they "
                    "were exported for other sites or another model."
                )
    rank = max(len(a) for a, _ in factors.values())
    arrays = {key: np.zeros((rank, *shape[1:]), np.float32) for key, shape in inputs.items()}
    for path, pair in factors.items():
        for end, x in zip("ab", pair, strict=True):
            arrays[f"{path}/{end}"][: len(x)] = x
    file = folder / ADAPTERS / f"{name or Path(source).resolve().name}.safetensors"
    refuse_existing(file, overwrite, None, "adapter")
    with staged(file, overwrite) as new:
        write_tensors(new, arrays, {})
    return file


def _apart(origin: Origin, parts: Sequence[Part]) -> tuple[Params, list[Part], dict[str, np.ndarray]]:
    """(params of the base alone, programs of which an adapter's factors are inputs, those of the origin's adapter)."""
    factors = products_of(origin)
    assert origin.adapter is not None
    base = _restored(cast(origin.base, "float32"))
    parts = [with_factors(part, base, origin.adapter.plan.sites) for part in parts]
    return base, parts, adapter_arrays(parts, factors)


def products_of(origin: Origin) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Path -> a (R, *stack, *in) and b (R, *stack, *out) of an adapter, its scale within b.

    Raises:
      ExportError: no adapter; parameters trained in full; a method that is more than a sum of products.
    """
    if origin.adapter is None:
        raise ExportError("there is no adapter: its factors cannot be inputs.")
    plan, factors, out = origin.adapter.plan, origin.adapter.factors, {}
    if plan.full:
        raise ExportError(
            f"the adapter has {plan.full[0].path!r} whole: it cannot be an input beside the base.\n  export it merged"
        )
    base, _ = flatten(_restored(origin.base))
    for site in plan.sites:
        update = update_of(site, base[site.path], factors[site.path], site.scale)
        if update.a is None or update.b is None or update.out_gain is not None or update.in_gain is not None:
            raise ExportError(
                f"{site.setting.kind} at {site.path!r} is more than a product of two factors.\n  export it merged"
            )
        out[site.path] = (np.asarray(update.a, np.float32), np.asarray(update.b, np.float32) * np.float32(site.scale))
    return out


def _refuse_others(path: Path) -> None:
    """Raise `ExportError` where a folder to be replaced holds what no export has written."""
    ours = {DOCUMENT, TOKENIZER, WEIGHTS, ADAPTERS}
    ends = (".onnx", ".stablehlo", ".tflite")
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        if file.name not in ours and file.suffix not in ends:
            raise ExportError(
                f"{str(path)!r} holds {file.name!r}, too, which is no part of an export: nothing is done."
            )


def _merged(origin: Origin) -> Params:
    if origin.adapter is None:
        return origin.base
    return merge(origin.base, origin.adapter.factors, origin.adapter.plan)


def _restored(params: Params) -> Params:
    def whole(x: Any) -> Any:
        return x.restore() if isinstance(x, Quantised) else x

    return jax.tree.map(whole, params, is_leaf=lambda x: isinstance(x, Quantised))


def _samples(
    origin: Origin,
    source: str | Path,
    author: Author,
    texts: Sequence[str],
    longest: int | None,
    files: Mapping[str, str] | None,
) -> list[Sample]:
    """What is measured on: texts, else the test rows, else sentences."""
    if texts or origin.adapter is None:
        return samples_of(author, texts or SENTENCES, longest)
    try:
        problem = problem_of(adapter_folder(source), files=files)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{e}, or other texts to measure on: texts=FILE") from None
    return samples_of(author, problem.test, longest)


def _about(author: Author, longest: int | None) -> dict[str, Any]:
    """What export.json says of texts: how a prompt is laid out, and which tokens mean what.

    Raises:
      ExportError: a template that changes the user's text.
    """
    loaded = author.loaded
    laid, alone = author.laid(_MARK, chat=False, system=None)
    before, mark, after = laid.partition(_MARK)
    if not mark:
        raise ExportError("the chat template does not lay out the user's text as it is.")
    return {
        "model": loaded.source,
        "tokenizer": {"file": TOKENIZER},
        "prompt": {"before": before, "after": after, "special_tokens": not alone},
        "chat_template": loaded.chat_template,
        "eos": list(loaded.special.eos),
        "pad": loaded.special.pad or 0,
        "start": loaded.special.start,
        "max_length": longest,
    }
