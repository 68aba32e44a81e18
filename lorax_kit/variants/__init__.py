"""One file per low-rank method; importing this folder fills core's table of variants."""

from lorax_kit.core.variant import VARIANTS
from lorax_kit.variants.dora import DORA
from lorax_kit.variants.lora import LORA

VARIANTS.update(lora=LORA, dora=DORA)

__all__ = ["DORA", "LORA"]
