"""One file per method: its equation, its setting, its leaves, `init` and `update`; registered on import."""

from lorax_kit.core.method import register
from lorax_kit.methods.dora import DORA, DoRA, DoRALeaves
from lorax_kit.methods.loha import LOHA, LoHa, LoHaLeaves
from lorax_kit.methods.lokr import LOKR, LoKr, LoKrLeaves
from lorax_kit.methods.lora import LORA, Factors, LoRA
from lorax_kit.methods.lora_xs import LORA_XS, LoRAXS, LoRAXSLeaves
from lorax_kit.methods.vera import VERA, VeRA, VeRALeaves

for _method in (LORA, DORA, VERA, LORA_XS, LOHA, LOKR):
    register(_method)

__all__ = [
    "DORA",
    "LOHA",
    "LOKR",
    "LORA",
    "LORA_XS",
    "VERA",
    "DoRA",
    "DoRALeaves",
    "Factors",
    "LoHa",
    "LoHaLeaves",
    "LoKr",
    "LoKrLeaves",
    "LoRA",
    "LoRAXS",
    "LoRAXSLeaves",
    "VeRA",
    "VeRALeaves",
]
