"""Low-rank adaptation for any JAX function.

Pure functions turn params into a frozen base plus low-rank factors (`resolve`, `split`, `adapt`, `merge`), train
only the factors (`partition`, `make_step`, `fit`), keep them apart from the base (`save_adapter`,
`load_adapter`), run whole rank ablations as one compiled program (`Study`, `run`), and replace pretrained parameters by
low-rank products (`compress`).
"""

from lorax_kit import compress
from lorax_kit import variants as _variants  # noqa: F401  (fills core's table of methods)
from lorax_kit.checkpoint import Adapter, fingerprint, load_adapter, load_peft, save_adapter, save_peft
from lorax_kit.core import (
    AdapterError,
    Factors,
    Full,
    FullLeaf,
    LoRA,
    LoraxError,
    Plan,
    PlanError,
    Spec,
    SpecError,
    StudyError,
    merge,
    paths,
    quantise,
    split,
)
from lorax_kit.parallel import device_mesh, pmap_step, sharded_step
from lorax_kit.study import Problem, Results, Study, run
from lorax_kit.training import Score, Weighted, fit, make_step, partition
from lorax_kit.transform import adapt, explain, resolve
from lorax_kit.version import __version__

__all__ = [
    "Adapter",
    "AdapterError",
    "Factors",
    "Full",
    "FullLeaf",
    "LoRA",
    "LoraxError",
    "Plan",
    "PlanError",
    "Problem",
    "Results",
    "Score",
    "Spec",
    "SpecError",
    "Study",
    "StudyError",
    "Weighted",
    "__version__",
    "adapt",
    "compress",
    "device_mesh",
    "explain",
    "fingerprint",
    "fit",
    "load_adapter",
    "load_peft",
    "make_step",
    "merge",
    "partition",
    "paths",
    "pmap_step",
    "quantise",
    "resolve",
    "run",
    "save_adapter",
    "save_peft",
    "sharded_step",
    "split",
]
