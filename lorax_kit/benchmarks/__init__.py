"""Measurements on this machine, side by side in one run: medians of alternating rounds, ratios, FLOPs and bytes.

Like `problems`, this folder joins models, tasks and the toolkit; nothing else imports it but the command line.
"""

from lorax_kit.benchmarks.calibrate import calibrate
from lorax_kit.benchmarks.inference.decode import DECODE_COLUMNS, MIXED_DECODE_COLUMNS, bench_decode, bench_mixed_decode
from lorax_kit.benchmarks.inference.forward import FORWARD_COLUMNS, bench_forward
from lorax_kit.benchmarks.inference.mixed import MIXED_COLUMNS, bench_mixed
from lorax_kit.benchmarks.scale import SCALE_COLUMNS, bench_scale
from lorax_kit.benchmarks.steps.grid import GRID, bench_grid
from lorax_kit.benchmarks.steps.methods import METHOD_COLUMNS, bench_methods
from lorax_kit.benchmarks.steps.step import COLUMNS, bench_step
from lorax_kit.benchmarks.study import STUDY_COLUMNS, bench_study
from lorax_kit.benchmarks.timing import table

__all__ = [
    "COLUMNS",
    "DECODE_COLUMNS",
    "FORWARD_COLUMNS",
    "GRID",
    "METHOD_COLUMNS",
    "MIXED_COLUMNS",
    "MIXED_DECODE_COLUMNS",
    "SCALE_COLUMNS",
    "STUDY_COLUMNS",
    "bench_decode",
    "bench_forward",
    "bench_grid",
    "bench_methods",
    "bench_mixed",
    "bench_mixed_decode",
    "bench_scale",
    "bench_step",
    "bench_study",
    "calibrate",
    "table",
]
