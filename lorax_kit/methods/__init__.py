"""One file per method: its equation, its setting, its leaves, `init` and `update`; registered on import."""

from lorax_kit.core.method import register
from lorax_kit.methods.adalora import ADALORA, AdaLoRA, AdaLoRALeaves
from lorax_kit.methods.delora import DELORA, DeLoRA, DeLoRALeaves
from lorax_kit.methods.dora import DORA, DoRA, DoRALeaves
from lorax_kit.methods.hra import HRA, HRA_METHOD, HRALeaves
from lorax_kit.methods.ia3 import IA3, IA3_METHOD, IA3Leaves
from lorax_kit.methods.lora import LORA, Factors, LoRA
from lorax_kit.methods.miss import MISS, MiSS, MiSSLeaves
from lorax_kit.methods.vera import VERA
from lorax_kit.methods.loha import LOHA
from lorax_kit.methods.lokr import LOKR
from lorax_kit.methods.rows import ROWS, Rows

for _method in (LORA, DORA, MISS, DELORA, HRA_METHOD, IA3_METHOD, ADALORA, ROWS, VERA, LOHA, LOKR):
    register(_method)

__all__ = [
    "ADALORA",
    "DELORA",
    "DORA",
    "HRA",
    "HRA_METHOD",
    "IA3",
    "IA3_METHOD",
    "LORA",
    "MISS",
    "ROWS",
    "AdaLoRA",
    "AdaLoRALeaves",
    "DeLoRA",
    "DeLoRALeaves",
    "DoRA",
    "DoRALeaves",
    "Factors",
    "HRALeaves",
    "IA3Leaves",
    "LoRA",
    "MiSS",
    "MiSSLeaves",
    "Rows",
]
