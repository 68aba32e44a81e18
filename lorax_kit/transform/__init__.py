"""Runs any traceable JAX function with low-rank parameters, without editing the model."""

from lorax_kit.transform.adapt import Adapted, adapt, compressed
from lorax_kit.transform.cost import Costs
from lorax_kit.transform.explain import Explanation, explain
from lorax_kit.transform.resolve import resolve

__all__ = ["Adapted", "Costs", "Explanation", "adapt", "compressed", "explain", "resolve"]
