"""Adapters as Hugging Face PEFT folders: adapter_config.json and adapter_model.safetensors.

`peft_config` reads and writes the one, `peft_layout` knows the tensors of the other.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_kit.checkpoint.adapter import Adapter, check_finite, named_arrays, plan_of
from lorax_kit.checkpoint.peft_config import (
    CONFIG,
    check_kept,
    kept_whole,
    make_config,
    read_config,
    setting_of,
    targeted,
)
from lorax_kit.checkpoint.peft_layout import (
    PREFIX,
    factors_of,
    find_axes,
    from_tensors,
    sort_out,
    to_tensors,
    transposed,
)
from lorax_kit.checkpoint.staging import refuse_existing, staged
from lorax_kit.checkpoint.tensors import read_tensors, write_tensors
from lorax_kit.core.errors import AdapterError, PlanError
from lorax_kit.core.leaves import FactorTree, FullLeaf, check_factors
from lorax_kit.core.paths import Params, closest, flatten
from lorax_kit.core.plan import Axes, Plan, make_plan
from lorax_kit.core.setting import Full
from lorax_kit.core.spec import AnySetting, Spec

WEIGHTS = "adapter_model.safetensors"


def save_peft(
    path: str | Path,
    plan: Plan | Spec,
    factors: FactorTree,
    *,
    base: Params,
    names: Mapping[str, str],
    base_model: str | None = None,
    overwrite: bool = False,
    **older: Any,
) -> None:
    """Write an adapter as a PEFT LoRA folder, for `peft.PeftModel.from_pretrained(model, path)`.

    The folder appears whole or not at all. Ranks, alphas and scales are kept exactly, arrays bit for bit;
    `start` and `compute_dtype` of the spec have no place in the format.

    Args:
      path: folder to create.
      plan: what the factors adapt, from `lk.resolve`. The call of earlier versions, `save_peft(path, spec, factors,
        ..., plan=plan)`, still works, with a warning.
      factors: the trained tree.
      base: the frozen params. PEFT trains modules, not parameters: where only some parameters of a module are
        trained in full, its others are written as they stand here.
      names: path of a parameter -> its name in the torch model, such as `lorax_kit.models.torch_names(config)`
        or `classifier_names(config)`. Of what is trained in full, a matrix called `kernel` is (in, out) here
        and (out, in) there; `embedding` and `weight` have one layout.
      base_model: name or path of the torch model, for PEFT's AutoPeftModel.
      overwrite: replace an existing folder; otherwise it is an error.

    Raises:
      AdapterError: the path exists; a parameter without a name; factors that do not fit or are not finite;
        what PEFT cannot express: stacked sites, convolutions, two methods, dropouts or kinds of scale in one
        adapter, a module both adapted and trained in full.

    Example:
      >>> import tempfile
      >>> import lorax_kit as lk
      >>> base = {"q": {"kernel": jnp.ones((4, 3))}}
      >>> plan = lk.resolve(lk.Spec({"q/kernel": lk.LoRA(rank=2, alpha=4)}), base)
      >>> factors = {"q/kernel": lk.Factors(jnp.ones((2, 4)), jnp.ones((2, 3)))}
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> save_peft(folder, plan, factors, base=base, names={"q/kernel": "q_proj.weight"})
      >>> load_peft(folder, base=base, names={"q/kernel": "q_proj.weight"}).plan.site("q/kernel").scale
      2.0
    """
    path = Path(path).absolute()
    refuse_existing(path, overwrite, CONFIG)
    plan = plan_of(plan, base, older, "save_peft")
    check_factors(plan, factors)
    check_finite(named_arrays(factors))
    named, _ = flatten(base)
    for p in plan.trained:
        if p not in names:
            raise AdapterError(f"`names` gives {p!r} no name in torch.\n  closest: {closest(p, list(names))}")
    tensors: dict[str, np.ndarray] = {}
    settings: dict[str, Any] = {}
    for site in plan.sites:
        module, _, leaf = names[site.path].rpartition(".")
        if leaf != "weight" or module in settings:
            raise AdapterError(
                f"{site.path!r} is {names[site.path]!r} in torch; PEFT adapts the `weight` of a module, once.\n"
                "  correct `names`, or use lk.save_adapter"
            )
        settings[module] = site.setting
        tensors |= {f"{PREFIX}{module}.{kind}": x for kind, x in to_tensors(site, factors[site.path]).items()}
    if not settings:
        raise AdapterError("the adapter has no low-rank site, and PEFT's LoRA needs one.\n  use lk.save_adapter")
    repeated = [name for name, n in Counter(names.values()).items() if n > 1]
    if repeated:
        raise AdapterError(f"`names` gives {repeated[0]!r} to several parameters.")
    whole = {_module(names[leaf.path]) for leaf in plan.full}
    for p, name in names.items():
        if _module(name) in whole:
            if p not in named:
                raise AdapterError(f"`names` has {p!r}, which the base lacks.\n  closest: {closest(p, list(named))}")
            trained = factors.get(p)
            value = trained.value if isinstance(trained, FullLeaf) else named[p]
            tensors[PREFIX + name] = transposed(p, np.asarray(value))
    config = make_config(settings, whole, {_module(name) for name in names.values()}, base_model)
    with staged(path, overwrite) as new:
        new.mkdir()
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tensors(new / WEIGHTS, tensors)


def load_peft(path: str | Path, *, base: Params, names: Mapping[str, str], plan: Plan | None = None) -> Adapter:
    """Read a PEFT LoRA folder as an adapter of `base`.

    PEFT adapts a module, this package a parameter: where one parameter serves two modules (a tied embedding),
    the update reaches both uses here. The format knows its base by name only, so shapes are all that is
    compared.

    Args:
      path: folder written by PEFT's `save_pretrained` or by `save_peft`.
      base: the frozen params.
      names: path of a parameter -> its name in the torch model; see `save_peft`.
      plan: any plan of the same parameters (`lk.resolve`), to say which axes of them are contracted. Without it
        kernels are (*in, *out), and a matrix of another name is taken the way its factors fit.

    Returns:
      An `Adapter`: one rule for each parameter in its spec, the content of adapter_config.json as its meta.

    Raises:
      AdapterError: no folder or damaged files; another method; a setting, target, layer or tensor that has no
        counterpart; factors missing, or of another rank or shape than config and base say.

    Example:
      adapter = lk.load_peft("folder", base=base, names=lorax_kit.models.torch_names(config))
      merged = lk.merge(base, adapter.factors, adapter.plan)
    """
    path = Path(path).absolute()
    config = read_config(path)
    if not (path / WEIGHTS).is_file():
        raise AdapterError(
            f"{str(path)!r} has no {WEIGHTS}.\n"
            "  pickled weights are not read: write it by save_pretrained(..., safe_serialization=True)"
        )
    named, _ = flatten(base)
    paths = {name: p for p, name in names.items() if p in named}
    by_module, rest = sort_out(read_tensors(path / WEIGHTS))
    _check_modules(config, by_module, paths)
    known = {} if plan is None else {s.path: s.axes for s in plan.sites}
    rules: dict[str, AnySetting] = {}
    axes: dict[str, tuple[Axes, str]] = {}
    arrays: dict[str, tuple[np.ndarray, ...]] = {}
    for module, found in by_module.items():
        p, lookup = paths[f"{module}.weight"], "embedding_a" in found
        setting = setting_of(config, module, str(next(iter(found.values())).dtype))
        a, b, *_ = arrays[p] = factors_of(module, found, setting.rank, setting.kind == "dora")
        rules[_literal(p)] = setting
        contracted = find_axes(p, named[p].shape, (a.shape[1], b.shape[0]), known.get(p), lookup)
        axes[p] = contracted, "lookup" if lookup else "product"
    full = _full_leaves(config, rest, paths, named)
    for p, value in full.items():
        rules[_literal(p)] = Full(dtype=None if value.dtype == named[p].dtype else str(value.dtype))
    spec = Spec(rules)
    try:
        made = make_plan(spec, base, axes)
    except PlanError as e:
        raise AdapterError(f"the adapter at {str(path)!r} does not fit: {e}") from None
    factors: dict[str, Any] = {site.path: from_tensors(site, *arrays[site.path]) for site in made.sites}
    return Adapter(made, factors | {p: FullLeaf(jnp.asarray(value)) for p, value in full.items()}, config)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _literal(path: str) -> str:
    """A spec's pattern for this path alone."""
    return f"re:{re.escape(path)}" if set(path) & set("*?{}") or path.startswith("re:") else path


def _check_modules(config: Mapping[str, Any], found: Mapping[str, Any], paths: Mapping[str, str]) -> None:
    """Raise `AdapterError` unless the modules with factors are those that the config targets, and the base has them."""
    modules = {_module(name) for name in paths if name.endswith(".weight")}
    wanted = targeted(config, modules)
    if not found:
        raise AdapterError(f"{WEIGHTS} holds no factors: there is nothing to adapt.")
    for module in sorted(set(found) - modules):
        raise AdapterError(
            f"{WEIGHTS} adapts {module!r}, which is no module of this base.\n"
            f"  closest: {closest(module, sorted(modules))}\n"
            "  is it the adapter of another model, or does `names` lack a prefix or a module?"
        )
    if wanted is not None:
        for module in sorted(set(found) - wanted):
            raise AdapterError(f"{WEIGHTS} adapts {module!r}, which {CONFIG} does not target.")
        for module in sorted(wanted - set(found)):
            raise AdapterError(f"{WEIGHTS} has no factors for {module!r}, which {CONFIG} targets.")


def _full_leaves(
    config: Mapping[str, Any], rest: Mapping[str, np.ndarray], paths: Mapping[str, str], named: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Path -> value of what modules_to_save trained; every other tensor must be a copy of the base's."""
    out: dict[str, np.ndarray] = {}
    check_kept(config, rest)
    for key, x in rest.items():
        name = key.replace(".base_layer.", ".")  # so PEFT keeps an adapted embedding itself
        if name not in paths:
            raise AdapterError(
                f"{WEIGHTS} has the tensor {key!r}, which is no parameter of this base.\n"
                f"  closest: {closest(name, list(paths))}"
            )
        p = paths[name]
        value = transposed(p, x)
        if value.shape != named[p].shape:
            raise AdapterError(f"{WEIGHTS} has {key!r} of shape {x.shape}, which does not fit {p!r} {named[p].shape}.")
        if name == key and kept_whole(config, name):
            out[p] = value
        elif not np.array_equal(value.astype(np.float32), np.asarray(named[p]).astype(np.float32)):
            raise AdapterError(
                f"{WEIGHTS} has the tensor {key!r}, which differs from the base and is not in modules_to_save.\n"
                f"  load the base with this value at {p!r}"
            )
    for name, p in paths.items():
        if kept_whole(config, name) and p not in out:
            raise AdapterError(f"{WEIGHTS} has no tensor {name!r}, which {CONFIG} keeps by modules_to_save.")
    return out
