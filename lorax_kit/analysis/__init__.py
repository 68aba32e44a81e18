"""What trained deltas look like, which directions they share, what the base forgets; and what seeds can tell."""

from lorax_kit.analysis.directions import Directions, delta_directions, weight_directions
from lorax_kit.analysis.forgetting import Change, forgetting, held_out_change
from lorax_kit.analysis.gradient_rank import at_steps, gradient_spectra
from lorax_kit.analysis.interventions import scale_intruders
from lorax_kit.analysis.intruders import SiteIntruders, adapter_intruders, count_intruders
from lorax_kit.analysis.overlap import SiteOverlap, adapter_overlaps, random_overlap, subspace_overlap
from lorax_kit.analysis.spectra import (
    SiteSpectrum,
    adapter_spectra,
    delta_spectrum,
    effective_rank,
    rank_for_energy,
    site_spectrum,
)

__all__ = [
    "Change",
    "Directions",
    "SiteIntruders",
    "SiteOverlap",
    "SiteSpectrum",
    "adapter_intruders",
    "adapter_overlaps",
    "adapter_spectra",
    "at_steps",
    "count_intruders",
    "delta_directions",
    "delta_spectrum",
    "effective_rank",
    "forgetting",
    "gradient_spectra",
    "held_out_change",
    "random_overlap",
    "rank_for_energy",
    "scale_intruders",
    "site_spectrum",
    "subspace_overlap",
    "weight_directions",
]
