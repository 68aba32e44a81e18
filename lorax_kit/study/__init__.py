"""A whole rank ablation as one compiled program: design, packing, engine, store."""

from lorax_kit.study.design import Study
from lorax_kit.study.run import Results, run
from lorax_kit.study.sampling import Sample
from lorax_kit.study.trial import Trial

__all__ = ["Results", "Sample", "Study", "Trial", "run"]
