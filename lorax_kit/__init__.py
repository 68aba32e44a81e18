"""Low-rank adaptation for any JAX function."""

from lorax_kit import variants as _variants  # fills core's table of methods
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
    split,
)
from lorax_kit.transform import adapt, explain, resolve
