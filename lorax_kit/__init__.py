"""Low-rank adaptation for any JAX function.

Pure functions turn params into a frozen base plus low-rank factors (`resolve`, `split`, `adapt`, `merge`), train
only the factors (`partition`, `make_step`, `fit`), keep them apart from the base (`save_adapter`,
`load_adapter`), combine and serve many of them (`algebra`), run whole rank ablations as one compiled program (`Study`,
`run`), and replace pretrained parameters by low-rank products (`compress`).
"""

import warnings

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
    quantize,
    register,
    split,
)
from lorax_kit.core.leaves import site_key
from lorax_kit.methods import HRA, IA3, AdaLoRA, DeLoRA, DoRA, Factors, LoHa, LoKr, LoRA, LoRAXS, MiSS, Rows, VeRA
from lorax_kit.parallel import device_mesh, layout, onto, place, pmap_step, sharded_step, study_mesh, training_mesh
from lorax_kit.peft import load_peft, save_peft
from lorax_kit.problem import Metric, Problem, Score, problem_at, problem_builder
from lorax_kit.starts import loftq
from lorax_kit.study import Halving, MedianRule, Results, Sample, Study, Workers, run
from lorax_kit.training import (
    Weighted,
    adalora_budget,
    first_rows,
    fit,
    lora_plus,
    make_step,
    nested,
    partition,
    riemannian,
)
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
    "Workers",
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
    "first_rows",
    "fit",
    "layout",
    "load_adapter",
    "load_peft",
    "loftq",
    "lora_plus",
    "make_step",
    "merge",
    "nested",
    "onto",
    "partition",
    "paths",
    "penalty",
    "place",
    "pmap_step",
    "problem_at",
    "problem_builder",
    "quantize",
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
    "study_mesh",
    "training_mesh",
]

_RENAMED = {"quantise": "quantize"}
"""Older names that work for one more version; `lorax_kit/guide/changelog.md` lists them."""


def __getattr__(name: str) -> object:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"lk.{name} is now lk.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
