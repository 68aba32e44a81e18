"""Trains the factors only: optimizer partition, the pure step, and a fit loop."""

from lorax_kit.training.budget import adalora_budget
from lorax_kit.training.evaluate import Score, SharedPrefix
from lorax_kit.training.fit import Fitted, fit
from lorax_kit.training.lora_plus import lora_plus
from lorax_kit.training.objective import Weighted
from lorax_kit.training.optim import labels, partition
from lorax_kit.training.riemannian import riemannian
from lorax_kit.training.step import Info, State, make_step

__all__ = [
    "Fitted",
    "Info",
    "Score",
    "SharedPrefix",
    "State",
    "Weighted",
    "adalora_budget",
    "fit",
    "labels",
    "lora_plus",
    "make_step",
    "partition",
    "riemannian",
]
