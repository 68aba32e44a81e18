"""Where low-rank factors begin, a file each: drawn (`draws`, `orthogonal`), or computed from W and from data.

| start | from | source |
| --- | --- | --- |
| kaiming, normal | draws | LoRA, PEFT |
| orthogonal | draws whose product is zero | PEFT |
| pissa, pissa_fast | W | arXiv 2404.02948 |
| olora | W | arXiv 2406.01775 |
| eva | inputs | arXiv 2410.07170 |
| corda_ipm, corda_kpm | W and inputs | arXiv 2406.05223 |
| lora_ga | gradient | arXiv 2407.05000 |

Those from inputs or a gradient need `lk.split(..., hints=lk.calibrate(...))`. None changes the base. `loftq`, beside
`split`, does.
"""

from lorax_kit.starts.corda import corda_ipm, corda_kpm
from lorax_kit.starts.draws import kaiming, normal
from lorax_kit.starts.eva import eva, eva_ranks
from lorax_kit.starts.loftq import loftq
from lorax_kit.starts.lora_ga import lora_ga
from lorax_kit.starts.olora import olora
from lorax_kit.starts.orthogonal import orthogonal
from lorax_kit.starts.pissa import pissa, pissa_fast
from lorax_kit.starts.ranks import spend_ranks
from lorax_kit.starts.start import STARTS, Start, start_of

STARTS.update(kaiming=kaiming, normal=normal, orthogonal=orthogonal, pissa=pissa, pissa_fast=pissa_fast, olora=olora)
STARTS.update(eva=eva, corda_ipm=corda_ipm, corda_kpm=corda_kpm, lora_ga=lora_ga)

__all__ = ["STARTS", "Start", "eva_ranks", "loftq", "spend_ranks", "start_of"]
