"""Text from models that write: one compiled step over a cache, sampled, streamed, with adapters in any form."""

from lorax_kit.generate.beams import beam_search
from lorax_kit.generate.decoder import Decoder, adapted, decoder_of, per_row_decoder
from lorax_kit.generate.sampling import Sampling
from lorax_kit.generate.write import Writer, Written

__all__ = ["Decoder", "Sampling", "Writer", "Written", "adapted", "beam_search", "decoder_of", "per_row_decoder"]
