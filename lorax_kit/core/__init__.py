"""Specs, plans and factor trees: what is adapted, and the exact split and merge of parameters."""

from lorax_kit.core.leaves import FactorTree, FullLeaf, penalty
from lorax_kit.core.merge import delta, effective_weight, merge, split
from lorax_kit.core.method import Hints, Method, Update, register
from lorax_kit.core.paths import Params, paths
from lorax_kit.core.plan import Plan, match
from lorax_kit.core.quantised import quantize
from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import Full, RankSetting, ScaledSetting, Setting
from lorax_kit.core.specs.spec import Spec
from lorax_kit.errors import AdapterError, LoraxError, PlanError, SpecError, StudyError

__all__ = [
    "AdapterError",
    "FactorTree",
    "Full",
    "FullLeaf",
    "Hints",
    "LoraxError",
    "Method",
    "Params",
    "Plan",
    "PlanError",
    "RankSetting",
    "ScaledSetting",
    "Setting",
    "Site",
    "Spec",
    "SpecError",
    "StudyError",
    "Update",
    "delta",
    "effective_weight",
    "match",
    "merge",
    "paths",
    "penalty",
    "quantize",
    "register",
    "split",
]
