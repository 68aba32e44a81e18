"""Low-rank adaptation for any JAX function.

Pure functions turn params into a frozen base plus low-rank factors (`resolve`, `split`, `adapt`, `merge`), train
only the factors (`partition`, `make_step`, `fit`), keep them apart from the base (`save_adapter`,
`load_adapter`), combine and serve many of them (`algebra`), run whole rank ablations as one compiled program (`Study`,
`run`), and replace pretrained parameters by low-rank products (`compress`).
"""

from lorax_kit import algebra, analysis, compress, starts
from lorax_kit.calibration import calibrate
from lorax_kit.checkpoint import Adapter, fingerprint, load_adapter, save_adapter
from lorax_kit.core import (
    AdapterError,
    Full,
    FullLeaf,
    Hints,
    LoraxError,
    Method,
    Plan,
    PlanError,
    RankSetting,
    ScaledSetting,
    Setting,
    Site,
    Spec,
    SpecError,
    StudyError,
    Update,
    merge,
    paths,
    penalty,
    quantise,
    register,
    split,
)
from lorax_kit.core.leaves import site_key
from lorax_kit.methods import HRA, IA3, AdaLoRA, DeLoRA, DoRA, Factors, LoHa, LoKr, LoRA, LoRAXS, MiSS, Rows, VeRA
from lorax_kit.parallel import device_mesh, pmap_step, sharded_step
from lorax_kit.peft import load_peft, save_peft
from lorax_kit.problem import Metric, Problem, Score, problem_at, problem_builder
from lorax_kit.starts import loftq
from lorax_kit.study import Halving, MedianRule, Results, Sample, Study, run
from lorax_kit.training import Weighted, adalora_budget, fit, lora_plus, make_step, partition, riemannian
from lorax_kit.transform import adapt, all_linear, explain, resolve
from lorax_kit.version import __version__

__all__ = [
    "HRA",
    "IA3",
    "AdaLoRA",
    "Adapter",
    "AdapterError",
    "DeLoRA",
    "DoRA",
    "Factors",
    "Full",
    "FullLeaf",
    "Halving",
    "Hints",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAXS",
    "LoraxError",
    "MedianRule",
    "Method",
    "Metric",
    "MiSS",
    "Plan",
    "PlanError",
    "Problem",
    "RankSetting",
    "Results",
    "Rows",
    "Sample",
    "ScaledSetting",
    "Score",
    "Setting",
    "Site",
    "Spec",
    "SpecError",
    "Study",
    "StudyError",
    "Update",
    "VeRA",
    "Weighted",
    "__version__",
    "adalora_budget",
    "adapt",
    "algebra",
    "all_linear",
    "analysis",
    "calibrate",
    "compress",
    "device_mesh",
    "explain",
    "fingerprint",
    "fit",
    "load_adapter",
    "load_peft",
    "loftq",
    "lora_plus",
    "make_step",
    "merge",
    "partition",
    "paths",
    "penalty",
    "pmap_step",
    "problem_at",
    "problem_builder",
    "quantise",
    "register",
    "resolve",
    "riemannian",
    "run",
    "save_adapter",
    "save_peft",
    "sharded_step",
    "site_key",
    "split",
    "starts",
]
