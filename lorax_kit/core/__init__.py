"""Specs, plans and factor trees: what is adapted, and the exact split and merge of parameters."""

from lorax_kit.core.errors import AdapterError, LoraxError, PlanError, SpecError, StudyError
from lorax_kit.core.factors import Factors, FactorTree, FullLeaf
from lorax_kit.core.merge import delta, effective_weight, merge, split
from lorax_kit.core.paths import Params, paths
from lorax_kit.core.plan import Plan, Site, match
from lorax_kit.core.quantised import quantise
from lorax_kit.core.spec import Full, LoRA, Spec

__all__ = [
    "AdapterError",
    "FactorTree",
    "Factors",
    "Full",
    "FullLeaf",
    "LoRA",
    "LoraxError",
    "Params",
    "Plan",
    "PlanError",
    "Site",
    "Spec",
    "SpecError",
    "StudyError",
    "delta",
    "effective_weight",
    "match",
    "merge",
    "paths",
    "quantise",
    "split",
]
