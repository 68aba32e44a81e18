"""What trained deltas look like (spectra, effective rank) and what seeds can tell (intervals, tests, comparisons)."""

from lorax_kit.analysis.spectra import delta_spectrum, effective_rank, rank_for_energy

__all__ = ["delta_spectrum", "effective_rank", "rank_for_energy"]
