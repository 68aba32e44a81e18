"""`evaluate`: a saved adapter, measured again, or a model as it is; and what it writes, against what was wanted."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from lorax_kit.checkpoint.adapter import load_adapter
from lorax_kit.commands.adapters.generation import Author, author_of
from lorax_kit.commands.adapters.written import written
from lorax_kit.commands.compress.compression import load_small, subject_of_small
from lorax_kit.core.paths import Params
from lorax_kit.core.plan import Plan
from lorax_kit.errors import LoraxError
from lorax_kit.files.staging import refuse_existing, staged
from lorax_kit.problem import Evaluator, Problem, version
from lorax_kit.problems import settings_from
from lorax_kit.problems.load import base_of, problem_of
from lorax_kit.problems.packaged.sentiment import adapter_folder


def evaluate_base(problem: Problem, texts: str | Path | None = None, *, progress: bool = True) -> dict[str, Any]:
    """Test metrics of a problem's model as it is.

    Args:
      texts: as of `evaluate_adapter`.

    Raises:
      LoraxError: `texts`, and a task that writes nothing.
      AdapterError: `texts` exists.
    """
    if texts is None:
        return _measured(problem, problem.params(jax.random.key(0)), ())
    settings = problem.facts.get("settings")
    if not isinstance(settings, dict) or "task" not in settings:
        raise LoraxError(f"problem {problem.name!r} is of no task in which a text can be compared: chat, translate.")
    asked: Any = settings_from(settings)
    author = author_of(asked.model, asked.quantise)
    wrote = _compared(problem, author, Path(texts), progress)
    return _measured(problem, problem.params(jax.random.key(0)), ()) | wrote


def evaluate_adapter(
    path: str | Path,
    address: str | None = None,
    texts: str | Path | None = None,
    *,
    files: Mapping[str, str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Test metrics of a saved adapter, by the program that measured it when its study ended.

    Args:
      address: of the problem, in place of the one that the adapter remembers.
      texts: a JSON Lines file to create: the model writes after each prompt of the test set, and what it writes is
        measured against what was wanted; see `lorax_kit.commands.adapters.written.written`.
      files: of the rows, where they are not where they were; see `lorax_kit.problems.load.problem_of`.

    Raises:
      AdapterError: no adapter, a damaged one, or one that names no problem known here; `texts` exists.
      LoraxError: `texts`, and a task that writes nothing.
    """
    path = adapter_folder(path)
    problem = problem_of(path, address, files)
    wrote = {} if texts is None else _compared(problem, author_of(path), Path(texts), progress)
    base = base_of(problem, path)
    adapter = load_adapter(path, base=base)
    return {"adapter": str(path), **_measured(problem, *version(base, adapter.factors, adapter.plan)), **wrote}


def evaluate_small(
    folder: str | Path, address: str | None = None, *, files: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Test metrics of the model in a folder of `lorax-kit compress --out`.

    Args:
      address, files: as of `evaluate_adapter`; the model that it was made of is loaded, too.

    Raises:
      CompressError: a damaged folder, or one of another model.
    """
    subject = subject_of_small(folder, address=address, files=files)
    _, small = load_small(folder, subject)
    quality = subject.quality(small.apply, small.params)
    named = {f"test_{metric.name}": quality.metrics[metric.name] for metric in subject.problem.all_metrics}
    examples = subject.problem.facts.get("test", quality.metrics["examples"])
    return {"model": str(folder), **named, "examples": examples}


def _measured(problem: Problem, params: Params, trained: Collection[str], plan: Plan | None = None) -> dict[str, Any]:
    metrics = Evaluator(problem, params, trained, problem.test, plan=plan)(params)
    named = {f"test_{metric.name}": metrics[metric.name] for metric in problem.all_metrics}
    return {**named, "examples": problem.facts.get("test", metrics["examples"])}


def _compared(problem: Problem, author: Author, file: Path, progress: bool) -> dict[str, Any]:
    """Metrics of what is written after the prompts of the test set; the texts go into a file."""
    refuse_existing(file, None, None, "file")
    generated = written(author, problem.test, progress=progress)
    with staged(file, False) as new:
        new.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in generated["rows"]), encoding="utf-8"
        )
    metrics = {f"test_{name}": value for name, value in generated["metrics"].items()}
    return {**metrics, "texts": str(file), "written": len(generated["rows"]), "left_out": generated["left_out"]}
