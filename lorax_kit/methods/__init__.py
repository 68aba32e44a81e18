"""One file per method: its equation, its setting, its leaves, `init` and `update`; registered on import."""

from lorax_kit.core.method import register
from lorax_kit.methods.adalora import ADALORA, AdaLoRA, AdaLoRALeaves
from lorax_kit.methods.delora import DELORA, DeLoRA, DeLoRALeaves
from lorax_kit.methods.dora import DORA, DoRA, DoRALeaves
from lorax_kit.methods.hra import HRA, HRA_METHOD, HRALeaves
from lorax_kit.methods.ia3 import IA3, IA3_METHOD, IA3Leaves
from lorax_kit.methods.loha import LOHA, LoHa, LoHaLeaves
from lorax_kit.methods.lokr import LOKR, LoKr, LoKrLeaves
from lorax_kit.methods.lora import LORA, Factors, LoRA
from lorax_kit.methods.lora_xs import LORA_XS, LoRAXS, LoRAXSLeaves
from lorax_kit.methods.miss import MISS, MiSS, MiSSLeaves
from lorax_kit.methods.rows import ROWS, RowLeaves, Rows
from lorax_kit.methods.vera import VERA, VeRA, VeRALeaves

_ALL = (LORA, DORA, ADALORA, DELORA, HRA_METHOD, IA3_METHOD, LOHA, LOKR, LORA_XS, MISS, ROWS, VERA)
for _method in _ALL:
    register(_method)

__all__ = [
    "HRA",
    "IA3",
    "AdaLoRA",
    "AdaLoRALeaves",
    "DeLoRA",
    "DeLoRALeaves",
    "DoRA",
    "DoRALeaves",
    "Factors",
    "HRALeaves",
    "IA3Leaves",
    "LoHa",
    "LoHaLeaves",
    "LoKr",
    "LoKrLeaves",
    "LoRA",
    "LoRAXS",
    "LoRAXSLeaves",
    "MiSS",
    "MiSSLeaves",
    "RowLeaves",
    "Rows",
    "VeRA",
    "VeRALeaves",
]
