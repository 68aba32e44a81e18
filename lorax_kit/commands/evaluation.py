"""`evaluate`: a saved adapter, measured again, or a model as it is."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

from lorax_kit.checkpoint.adapter import load_adapter
from lorax_kit.core.paths import Params
from lorax_kit.core.plan import Plan
from lorax_kit.problem import Evaluator, Problem, version
from lorax_kit.problems.load import base_of, problem_of
from lorax_kit.problems.packaged.sentiment import adapter_folder


def evaluate_base(problem: Problem) -> dict[str, Any]:
    """Test metrics of a problem's model as it is."""
    base = problem.params(jax.random.key(0))
    return _measured(problem, base, ())


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
    return {"adapter": str(path), **_measured(problem, *version(base, adapter.factors, adapter.plan))}


def _measured(problem: Problem, params: Params, trained: Collection[str], plan: Plan | None = None) -> dict[str, Any]:
    found = Evaluator(problem, params, trained, problem.test, plan=plan)(params)
    named = {f"test_{metric.name}": found[metric.name] for metric in problem.all_metrics}
    return {**named, "examples": found["examples"]}
