"""`evaluate`: a saved adapter, measured again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorax_kit.checkpoint.adapter import load_adapter
from lorax_kit.core.merge import merge
from lorax_kit.problem import Evaluator
from lorax_kit.problems.load import base_of, problem_of
from lorax_kit.problems.packaged.sentiment import adapter_folder


def evaluate_adapter(path: str | Path, address: str | None = None) -> dict[str, Any]:
    """Test metrics of a saved adapter, by the program that measured it when its study ended.

    Args:
      address: of the problem, in place of the one that the adapter remembers.

    Raises:
      AdapterError: no adapter, a damaged one, or one that names no problem known here.
    """
    path = adapter_folder(path)
    problem = problem_of(path, address)
    base = base_of(problem, path)
    adapter = load_adapter(path, base=base)
    merged = merge(base, adapter.factors, adapter.plan)
    measured = Evaluator(problem, merged, adapter.plan.trained, problem.test)(merged)
    named = {f"test_{metric.name}": measured[metric.name] for metric in problem.all_metrics}
    return {"adapter": str(path), **named, "examples": measured["examples"]}
