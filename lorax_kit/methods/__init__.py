"""One file per method: its equation, its setting, its leaves, `init` and `update`; registered on import."""

from lorax_kit.core.method import register
from lorax_kit.methods.dora import DORA, DoRA, DoRALeaves
from lorax_kit.methods.lora import LORA, Factors, LoRA
from lorax_kit.methods.rows import ROWS, Rows

for _method in (LORA, DORA, ROWS):
    register(_method)

__all__ = ["DORA", "LORA", "ROWS", "DoRA", "DoRALeaves", "Factors", "LoRA", "Rows"]
