"""A study as data: its axes, its trials, designs drawn from ranges."""

from lorax_kit.study.design.sampling import Sample
from lorax_kit.study.design.stopping import Halving, MedianRule
from lorax_kit.study.design.study import Study
from lorax_kit.study.design.trial import AXES, Trial

__all__ = ["AXES", "Halving", "MedianRule", "Sample", "Study", "Trial"]
