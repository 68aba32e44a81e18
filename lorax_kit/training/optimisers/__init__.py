"""Which optimiser moves which leaves (`partition`), and transformations made for low-rank factors, a file each."""

from lorax_kit.training.optimisers.budget import adalora_budget
from lorax_kit.training.optimisers.lora_plus import lora_plus
from lorax_kit.training.optimisers.partition import labels, partition
from lorax_kit.training.optimisers.riemannian import riemannian

__all__ = ["adalora_budget", "labels", "lora_plus", "partition", "riemannian"]
