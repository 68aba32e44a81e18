"""Adapters as vectors: scaled, added, combined, cut, taken from checkpoints, served side by side.

All of it is on the deltas, W' - W of each site, never on the factors apart. An adapter is anything with a `plan` and
`factors`: an `Adaptation`, or what `lk.load_adapter` returns. Results are plain LoRA, for `lk.merge`, `lk.adapt` and
`lk.save_adapter`.
"""

from lorax_kit.algebra.adaptation import Adaptation
from lorax_kit.algebra.combine import WAYS, combine, combine_into
from lorax_kit.algebra.extract import extract
from lorax_kit.algebra.linear import add, average, concatenate, negate, scale, subtract
from lorax_kit.algebra.merge_loss import MergeLoss, merge_loss
from lorax_kit.algebra.per_row import per_row, rows_of
from lorax_kit.algebra.rank import grow, to_lora, truncate
from lorax_kit.algebra.stack import Stacked, stack, swap

__all__ = [
    "WAYS",
    "Adaptation",
    "MergeLoss",
    "Stacked",
    "add",
    "average",
    "combine",
    "combine_into",
    "concatenate",
    "extract",
    "grow",
    "merge_loss",
    "negate",
    "per_row",
    "rows_of",
    "scale",
    "stack",
    "subtract",
    "swap",
    "to_lora",
    "truncate",
]
