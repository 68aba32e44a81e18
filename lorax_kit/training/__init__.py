"""Trains the factors only: optimizer partition, the pure step, and a fit loop."""

from lorax_kit.training.fit import Fitted, fit
from lorax_kit.training.nested import first_rows, nested
from lorax_kit.training.objective import Weighted
from lorax_kit.training.optimisers import adalora_budget, labels, lora_plus, partition, riemannian
from lorax_kit.training.step import Info, State, make_step

__all__ = [
    "Fitted",
    "Info",
    "State",
    "Weighted",
    "adalora_budget",
    "first_rows",
    "fit",
    "labels",
    "lora_plus",
    "make_step",
    "nested",
    "partition",
    "riemannian",
]
