"""Runs any traceable JAX function with low-rank parameters, without editing the model."""

from lorax_kit.transform.adapt import Adapted, adapt, compressed
from lorax_kit.transform.cost import Costs
from lorax_kit.transform.explain import Explanation, explain
from lorax_kit.transform.resolve import resolve
from lorax_kit.transform.targets import all_linear
from lorax_kit.transform.trace import Given, watch

__all__ = [
    "Adapted",
    "Costs",
    "Explanation",
    "Given",
    "adapt",
    "all_linear",
    "compressed",
    "explain",
    "resolve",
    "watch",
]
