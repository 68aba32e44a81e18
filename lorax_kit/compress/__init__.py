"""Low-rank compression of pretrained parameters: decompose, choose ranks, replace.

`calibrate` sums what parameters are given, `plan_ranks` chooses ranks under a budget, `compress` replaces parameters
by products, and `compressed` runs any JAX function with them. `solve` is the penalised decomposition of one matrix.
"""

from lorax_kit.calibration.calibrate import Moments, calibrate
from lorax_kit.compress.allocate import ALLOCATIONS, Candidate, allocate, candidate
from lorax_kit.compress.decompose import METHODS, damping
from lorax_kit.compress.distil import distil, distillation
from lorax_kit.compress.heal import heal, tune
from lorax_kit.compress.objective import Solution, objective, solve, solve_by_gradient
from lorax_kit.compress.prune import PRUNINGS, prune
from lorax_kit.compress.replace import CompressPlan, compress, plan_ranks, with_residuals
from lorax_kit.compress.sequential import compress_sequentially
from lorax_kit.core.lowrank import LowRank
from lorax_kit.errors import CompressError
from lorax_kit.transform.adapt import compressed

__all__ = [
    "ALLOCATIONS",
    "METHODS",
    "PRUNINGS",
    "Candidate",
    "CompressError",
    "CompressPlan",
    "LowRank",
    "Moments",
    "Solution",
    "allocate",
    "calibrate",
    "candidate",
    "compress",
    "compress_sequentially",
    "compressed",
    "damping",
    "distil",
    "distillation",
    "heal",
    "objective",
    "plan_ranks",
    "prune",
    "solve",
    "solve_by_gradient",
    "tune",
    "with_residuals",
]
