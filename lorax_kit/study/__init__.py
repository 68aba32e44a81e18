"""A whole rank ablation as one compiled program: design, packing, engine, store."""

from lorax_kit.study.design import Study, Trial
from lorax_kit.study.run import Results, run

__all__ = ["Results", "Study", "Trial", "run"]
