"""Where low-rank factors begin, a file each: drawn (`draws`), or computed from the parameter and from data."""

from lorax_kit.starts.draws import kaiming, normal
from lorax_kit.starts.start import STARTS, Start, start_of

STARTS.update(kaiming=kaiming, normal=normal)

__all__ = ["STARTS", "Start", "start_of"]
