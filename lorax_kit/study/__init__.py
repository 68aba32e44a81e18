"""A whole rank ablation as one compiled program: design, packing, engine, store."""

from lorax_kit.study.design.sampling import Sample
from lorax_kit.study.design.stopping import Halving, MedianRule
from lorax_kit.study.design.study import Study
from lorax_kit.study.design.trial import Trial
from lorax_kit.study.run import Results, run
from lorax_kit.study.running.cluster import Workers
from lorax_kit.study.search import search

__all__ = ["Halving", "MedianRule", "Results", "Sample", "Study", "Trial", "Workers", "run", "search"]
