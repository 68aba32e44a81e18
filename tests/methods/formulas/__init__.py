"""The papers' own formulas in float64 numpy: what judges `lorax_kit.methods` and `lorax_kit.starts`.

Nothing here imports the package, and nothing uses the normal form: a Kronecker product is `np.kron`, a chain of
reflections is multiplied out. tests/methods/test_formulas_interop.py holds each against the real PEFT.

One layout. W is (in, out), the transpose of torch's `weight`, so y = x W + bias; the axes of an N-D kernel are
flattened to (in, out) by the caller. Leaves have the rank first: `a` (r, in), `b` (r, out). A formula takes W and the
leaves and returns the effective weight W' (in, out).
"""

from tests.methods.formulas.adalora import (
    adalora,
    adalora_budget,
    adalora_keep,
    adalora_penalty,
    adalora_scores,
    adalora_smoothed,
)
from tests.methods.formulas.counts import TRAINED
from tests.methods.formulas.data_starts import corda, eva, eva_ranks, lora_ga, lora_ga_step
from tests.methods.formulas.multiplicative import hra, hra_penalty, ia3
from tests.methods.formulas.product import delora, dora, lora, lora_bias, lora_scale, lora_xs, vera
from tests.methods.formulas.starts import (
    gaussian_std,
    kaiming_bound,
    loftq,
    lora_xs_frozen,
    olora,
    orthogonal,
    pissa,
    svd_part,
    torch_uniform,
    vera_draws,
)
from tests.methods.formulas.structured import factorized, loha, lokr, lokr_factored, miss, miss_bat

__all__ = [
    "TRAINED",
    "adalora",
    "adalora_budget",
    "adalora_keep",
    "adalora_penalty",
    "adalora_scores",
    "adalora_smoothed",
    "corda",
    "delora",
    "dora",
    "eva",
    "eva_ranks",
    "factorized",
    "gaussian_std",
    "hra",
    "hra_penalty",
    "ia3",
    "kaiming_bound",
    "loftq",
    "loha",
    "lokr",
    "lokr_factored",
    "lora",
    "lora_bias",
    "lora_ga",
    "lora_ga_step",
    "lora_scale",
    "lora_xs",
    "lora_xs_frozen",
    "miss",
    "miss_bat",
    "olora",
    "orthogonal",
    "pissa",
    "svd_part",
    "torch_uniform",
    "vera",
    "vera_draws",
]
