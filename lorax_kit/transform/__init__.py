"""Runs any traceable JAX function with low-rank parameters, without editing the model."""

from lorax_kit.transform import rules as _rules  # noqa: F401  (fills the interpreter's table)
from lorax_kit.transform.adapt import Adapted, adapt, compressed
from lorax_kit.transform.cost import Costs
from lorax_kit.transform.explain import Explanation, explain
from lorax_kit.transform.interpreter.bind import bind
from lorax_kit.transform.interpreter.registry import rule
from lorax_kit.transform.resolve import all_linear, resolve
from lorax_kit.transform.trace import Given, watch

__all__ = [
    "Adapted",
    "Costs",
    "Explanation",
    "Given",
    "adapt",
    "all_linear",
    "bind",
    "compressed",
    "explain",
    "resolve",
    "rule",
    "watch",
]
