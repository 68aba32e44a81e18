"""Hugging Face PEFT LoRA folders: adapter_config.json and adapter_model.safetensors.

PEFT keeps y = x W^T + s (x A^T) B^T with A (r, in) and B (out, r): A is our `a`, B is `b` transposed; of an
embedding, A (r, vocab) and B (dim, r). DoRA's magnitude is (out,) in both. Axes of an N-D kernel are
flattened to (in, out) on the way out and found again from the base on the way in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_kit.checkpoint.adapter import Adapter, check_finite, named_arrays
from lorax_kit.checkpoint.peft_config import (
    CONFIG,
    check_kept,
    kept_whole,
    make_config,
    read_config,
    setting_of,
    targeted,
)
from lorax_kit.checkpoint.staging import refuse_existing, staged
from lorax_kit.checkpoint.tensors import read_tensors, write_tensors
from lorax_kit.core.errors import AdapterError, PlanError
from lorax_kit.core.factors import Factors, FactorTree, FullLeaf, check_factors
from lorax_kit.core.paths import Params, closest, flatten
from lorax_kit.core.plan import Axes, Plan, Site, make_plan
from lorax_kit.core.spec import Full, LoRA, Setting, Spec

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LINEAR = {"a": "lora_A.weight", "b": "lora_B.weight"}
_EMBEDDING = {"a": "lora_embedding_A", "b": "lora_embedding_B"}
_MAGNITUDE = "lora_magnitude_vector"
_FACTOR = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_[AB]|lora_magnitude_vector(?:\.weight)?)")


def save_peft(
    path: str | Path,
    spec: Spec,
    factors: FactorTree,
    *,
    base: Params,
    names: Mapping[str, str],
    plan: Plan | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter as a PEFT LoRA folder, for `peft.PeftModel.from_pretrained(model, path)`.

    The folder appears whole or not at all. Ranks, alphas and scales are kept exactly; arrays keep their dtype.
    `init` and `compute_dtype` of the spec have no place in the format.

    Args:
      path: folder to create.
      spec: what the factors adapt.
      factors: the trained tree.
      base: the frozen params. A parameter that belongs to a module trained only in part is written from here.
      names: path of a parameter -> its name in the torch model, such as `lorax_kit.models.torch_names(config)`
        or `classifier_names(config)`. Trained in full, a matrix called `kernel` is (in, out) here and
        (out, in) there; `embedding` and `weight` have one layout.
      plan: the plan of the factors; needed where a site is not an (in, out) matrix.
      base_model: name or path of the torch model, for PEFT's AutoPeftModel.
      overwrite: replace an existing folder; otherwise it is an error.

    Raises:
      AdapterError: the path exists; a parameter without a name; factors that do not fit or are not finite;
        what PEFT cannot express: stacked sites, convolutions, two variants, dropouts or kinds of scale in one
        adapter, a module both adapted and trained in full.
      PlanError: no plan was given, and a site is not a matrix.

    Example:
      >>> import tempfile
      >>> spec, base = Spec({"q/kernel": LoRA(rank=2, alpha=4)}), {"q": {"kernel": jnp.ones((4, 3))}}
      >>> factors = {"q/kernel": Factors(jnp.ones((2, 4)), jnp.ones((2, 3)))}
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> save_peft(folder, spec, factors, base=base, names={"q/kernel": "q_proj.weight"})
      >>> load_peft(folder, base=base, names={"q/kernel": "q_proj.weight"}).plan.site("q/kernel").scale
      2.0
    """
    path = Path(path).absolute()
    refuse_existing(path, overwrite)
    plan = make_plan(spec, base) if plan is None else plan
    check_factors(plan, factors)
    check_finite(named_arrays(factors))
    named, _ = flatten(base)
    modules = {_module(name) for name in names.values()}
    tensors: dict[str, np.ndarray] = {}
    settings: dict[str, LoRA] = {}
    for site in plan.sites:
        name, found = _name(names, site.path), factors[site.path]
        assert isinstance(found, Factors)
        if not name.endswith(".weight") or _module(name) in settings:
            raise AdapterError(
                f"{site.path!r} is {name!r} in torch; PEFT adapts the weight of a module, each once.\n"
                "  correct `names`, or use lk.save_adapter"
            )
        settings[_module(name)] = site.setting
        tensors |= {f"{_PREFIX}{_module(name)}.{part}": x for part, x in _site_tensors(site, found).items()}
    if not settings:
        raise AdapterError("the adapter has no low-rank site; PEFT's LoRA needs one.\n  use lk.save_adapter")
    whole = {_module(_name(names, leaf.path)) for leaf in plan.full}
    values = {p: leaf.value for p, leaf in factors.items() if isinstance(leaf, FullLeaf)}
    for p, name in names.items():
        if _module(name) in whole:
            value = values[p] if p in values else _leaf(named, p)
            tensors[_PREFIX + name] = _transposed(p, np.asarray(value))
    config = make_config(settings, whole, modules, base_model)
    with staged(path) as new:
        new.mkdir()
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tensors(new / WEIGHTS, tensors)


def load_peft(path: str | Path, *, base: Params, names: Mapping[str, str], plan: Plan | None = None) -> Adapter:
    """Read a PEFT LoRA folder as an adapter of `base`.

    PEFT adapts a module, this package a parameter: where one parameter serves two modules (a tied embedding),
    the update reaches both uses here. The format names no base by its weights, so only shapes are compared.

    Args:
      path: folder written by PEFT's `save_pretrained` or by `save_peft`.
      base: the frozen params.
      names: path of a parameter -> its name in the torch model; see `save_peft`.
      plan: any plan of the same parameters (`lk.resolve`), to say which axes of them are contracted. Without it,
        kernels are (*in, *out), and a matrix of another name is taken the way that its factors fit.

    Returns:
      An `Adapter`; one rule per parameter in its spec, the content of adapter_config.json as its meta.

    Raises:
      AdapterError: no folder or damaged files; another method; a setting, target, layer or tensor that has no
        counterpart; factors missing, or of another rank or shape than config and base say.
    """
    path = Path(path).absolute()
    config = read_config(path)
    if not (path / WEIGHTS).is_file():
        raise AdapterError(
            f"{str(path)!r} has no {WEIGHTS}.\n  pickled weights are not read: save_pretrained(safe_serialization=True)"
        )
    named, _ = flatten(base)
    paths = {name: p for p, name in names.items() if p in named}
    parts, rest = _sorted_out(read_tensors(path / WEIGHTS))
    wanted = targeted(config, {_module(n) for n in paths if n.endswith(".weight")})
    _check_modules(config, parts, wanted, paths)
    rules: dict[str, Setting] = {}
    axes: dict[str, tuple[Axes, bool]] = {}
    for module, found in parts.items():
        p, (a, b, _) = paths[f"{module}.weight"], _factors(config, module, found)
        known = {s.path: s.axes for s in plan.sites} if plan is not None else {}
        lookup = _EMBEDDING["a"] in found
        axes[p] = known.get(p) or _axes(p, named[p].shape, a.shape[1], b.shape[0], lookup), lookup
        rules[_literal(p)] = setting_of(config, module, str(a.dtype))
    full = _full_leaves(config, rest, paths, named)
    for p, value in full.items():
        rules[_literal(p)] = Full(dtype=None if value.dtype == named[p].dtype else str(value.dtype))
    spec = Spec(rules)
    try:
        made = make_plan(spec, base, axes)
    except PlanError as e:
        raise AdapterError(f"the adapter at {str(path)!r} does not fit: {e}") from None
    factors: dict[str, Factors | FullLeaf] = {}
    for site in made.sites:
        module = _module(names[site.path])
        factors[site.path] = _site_factors(site, *_factors(config, module, parts[module]))
    factors |= {p: FullLeaf(jnp.asarray(value)) for p, value in full.items()}
    return Adapter(spec, made, factors, config)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _name(names: Mapping[str, str], path: str) -> str:
    if path not in names:
        raise AdapterError(f"`names` gives {path!r} no name in torch.\n  closest: {closest(path, list(names))}")
    return names[path]


def _leaf(named: Mapping[str, Any], path: str) -> Any:
    if path not in named:
        raise AdapterError(f"`names` has {path!r}, which the base lacks.\n  see them all: lk.paths(params)")
    return named[path]


def _literal(path: str) -> str:
    """A spec's pattern for this path alone."""
    return "re:" + re.escape(path) if set(path) & set("*?{}") or path.startswith("re:") else path


def _transposed(path: str, x: np.ndarray) -> np.ndarray:
    """A parameter in torch's layout, or one of torch's in ours: the same exchange both ways."""
    leaf = path.rpartition("/")[2]
    if x.ndim < 2 or leaf in ("embedding", "weight"):
        return x
    if x.ndim == 2 and leaf == "kernel":
        return x.T
    raise AdapterError(
        f"{path!r} of shape {x.shape} is trained in full, and its layout in torch cannot be told from its name.\n"
        "  use lk.save_adapter, or name a matrix 'kernel' (in, out), 'weight' or 'embedding'"
    )


def _site_tensors(site: Site, found: Factors) -> dict[str, np.ndarray]:
    """PEFT's tensors of one site."""
    if site.axes.stack or len(site.axes.inputs) > 2:
        what = "is stacked over layers or experts" if site.axes.stack else "contracts three axes, like a convolution"
        raise AdapterError(f"{site.path!r} of shape {site.shape} {what}: PEFT's LoRA has no such factors.\n"
                           "  use lk.save_adapter")
    a, b = (np.asarray(x).reshape(site.setting.rank, -1) for x in (found.a, found.b))
    keys = _EMBEDDING if site.lookup or site.path.rpartition("/")[2] == "embedding" else _LINEAR
    out = {keys["a"]: a, keys["b"]: b.T}
    if site.setting.variant == "dora":
        if found.magnitude is None or found.magnitude.shape != site.out_shape:
            raise AdapterError(f"the factors at {site.path!r} lack a magnitude of shape {site.out_shape}.")
        out[_MAGNITUDE] = np.asarray(found.magnitude).reshape(-1)
    return out


def _site_factors(site: Site, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray | None) -> Factors:
    """Inverse of `_site_tensors`."""
    if (a.shape[1], b.shape[0]) != (prod(site.in_shape), prod(site.out_shape)):
        raise AdapterError(_misfit(site.path, site.shape, a.shape[1], b.shape[0]))
    m = None if magnitude is None else jnp.asarray(magnitude.reshape(site.out_shape))
    return Factors(jnp.asarray(a.reshape(site.a_shape)), jnp.asarray(b.T.reshape(site.b_shape)), m)


def _misfit(path: str, shape: tuple[int, ...], n_in: int, n_out: int) -> str:
    return (
        f"the adapter's factors take {n_in} to {n_out}, which {path!r} of shape {shape} does not.\n"
        "  load the base it was trained on; where axes are contracted in another order, pass plan=lk.resolve(...)"
    )


def _axes(path: str, shape: tuple[int, ...], n_in: int, n_out: int, lookup: bool) -> Axes:
    """Which axes of a parameter are its input, from the sizes of its factors."""
    ways = [(range(k), range(k, len(shape))) for k in range(1, len(shape))]
    if len(shape) == 2 and not lookup and path.rpartition("/")[2] != "kernel":
        ways.append((range(1, 2), range(1)))
    fits = [w for w in ways if [prod(shape[i] for i in side) for side in w] == [n_in, n_out]]
    if not fits:
        raise AdapterError(_misfit(path, shape, n_in, n_out))
    if len(fits) > 1:
        raise AdapterError(
            f"the factors fit {path!r} of shape {shape} in {len(fits)} ways: which axes are contracted?\n"
            "  say it by a plan: plan=lk.resolve(spec, params, apply_fn, *inputs)"
        )
    return Axes(inputs=tuple(fits[0][0]), outputs=tuple(fits[0][1]))


def _sorted_out(
    tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Factors by module and kind, and what is left, all without PEFT's prefix."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    rest: dict[str, np.ndarray] = {}
    for key, x in tensors.items():
        if not key.startswith(_PREFIX):
            raise AdapterError(f"{WEIGHTS} has the tensor {key!r}; PEFT's start with {_PREFIX!r}.")
        if str(x.dtype) not in ("float32", "bfloat16", "float16"):
            raise AdapterError(f"{WEIGHTS} has {key!r} as {x.dtype}; float32, bfloat16 and float16 can be read.")
        found = _FACTOR.fullmatch(key.removeprefix(_PREFIX))
        if found:
            parts.setdefault(found[1], {})[found[2].removesuffix(".weight") if _MAGNITUDE in key else found[2]] = x
        else:
            rest[key.removeprefix(_PREFIX)] = x
    return parts, rest
