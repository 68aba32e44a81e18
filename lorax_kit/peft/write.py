"""The modules of an adapter as PEFT keeps them: one for each matrix of a site, or for several sites at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lorax_kit.core.leaves import FactorTree
from lorax_kit.core.lowrank import dense
from lorax_kit.core.method import method_of
from lorax_kit.core.plan import Plan
from lorax_kit.core.site import Site
from lorax_kit.errors import AdapterError, LoraxError
from lorax_kit.peft.layout import Way, from_site, matrix_of, ways
from lorax_kit.peft.names import Names, Place
from lorax_kit.peft_form import PeftForm, TorchModule


@dataclass
class Written:
    """One module with its tensors.

    Attributes:
      module: in torch.
      form: of its method.
      setting, leaves: as the form has them.
      prefix: what the names of its tensors begin with.
      tensors: by the ends of their names.
      parameter: name of a parameter that is no module's weight (experts), or None.
      beside: (key of the config, value) of a method that stands beside another.
      heads: tensors of the heads that move with an embedding, by their names in torch.
      head_modules: their modules.
    """

    module: TorchModule
    form: PeftForm
    setting: Any
    leaves: dict[str, Any]
    prefix: str
    tensors: dict[str, np.ndarray]
    parameter: str | None = None
    beside: tuple[str, Any] | None = None
    heads: dict[str, np.ndarray] = field(default_factory=dict)
    head_modules: list[str] = field(default_factory=list)


def form_of(site: Site) -> PeftForm:
    """How PEFT keeps the method of a site."""
    form = method_of(site.setting).peft
    if form is None:
        raise AdapterError(
            f"{site.path!r} is adapted by {site.setting.kind}, which PEFT does not have.\n  use lk.save_adapter"
        )
    return form


def written(plan: Plan, factors: FactorTree, torch: Names, named: Mapping[str, Any]) -> dict[str, Written]:
    """Every adapted module by its name.

    Raises:
      AdapterError: what PEFT cannot express.
    """
    sites = {site.path: site for site in plan.sites}
    if not sites:
        raise AdapterError("the adapter has no adapted site, and PEFT needs one.\n  use lk.save_adapter")
    main = _main_form(plan)
    out: dict[str, Written] = {}
    experts: dict[str, list[Written]] = {}
    for name, places in torch.places.items():
        mine = [p for p in places if p.path in sites]
        if not mine:
            continue
        form = form_of(sites[mine[0].path])
        entry = _module(name, places, sites, factors, torch, named, form)
        if entry.parameter is not None:
            experts.setdefault(entry.module.name, []).append(entry)
            continue
        if form is not main and main.peft_type in form.beside:
            end, key = form.beside[main.peft_type]
            entry.tensors = {end: next(iter(entry.tensors.values()))}
            entry.beside = key, next(iter(form.config(entry.module, entry.setting, entry.leaves).values()))
        out[entry.module.name] = entry
        _tie(entry, sites[mine[0].path], torch)
    for module, group in experts.items():
        _nest(module, group, out)
    return out


def _main_form(plan: Plan) -> PeftForm:
    """The form that the folder is of.

    Raises:
      AdapterError: two methods that PEFT cannot have side by side.
    """
    forms: dict[int, tuple[PeftForm, Site]] = {}
    for site in plan.sites:
        forms.setdefault(id(form_of(site)), (form_of(site), site))
    pairs = list(forms.values())
    types = {form.peft_type for form, _ in pairs}
    mains = [(form, site) for form, site in pairs if not types & set(form.beside)]
    if len(mains) > 1:
        (_, one), (_, two) = mains[:2]
        raise AdapterError(
            f"PEFT has one method for all modules; here it is {one.setting.kind!r} at {one.path!r} and "
            f"{two.setting.kind!r} at {two.path!r}.\n  use lk.save_adapter, or one method"
        )
    return mains[0][0] if mains else pairs[0][0]


def _module(
    name: str,
    places: list[Place],
    sites: Mapping[str, Site],
    factors: FactorTree,
    torch: Names,
    named: Mapping[str, Any],
    form: PeftForm,
) -> Written:
    """One torch parameter, whole or of several of ours."""
    module, _, end = name.rpartition(".")
    place = next(p for p in places if p.path in sites)
    site = sites[place.path]
    parameter = end != "weight"
    if not module or (parameter and form.apart is None):
        raise AdapterError(
            f"{site.path!r} is {name!r} in torch; PEFT adapts the `weight` of a module by {site.setting.kind}.\n"
            "  correct `names`, or use lk.save_adapter"
        )
    experts = parameter and len(site.shape) == 3 and len(site.axes.stack) == 1
    if site.axes.stack != torch.stack[site.path] and not experts:
        raise AdapterError(
            f"{site.path!r} of shape {site.shape} is stacked over layers or experts, and {name!r} is one module.\n"
            "  give a name with {} for each stacked axis, such as 'layers.{}.up.weight', or use lk.save_adapter"
        )
    way = _way(site, name, torch, form)
    total = max((p.outputs[1] for p in places if p.outputs), default=way.outputs)

    def weight() -> np.ndarray:
        parts = places if place.outputs else [place]
        return np.concatenate([matrix_of(way, dense(named[p.path]), p.at) for p in parts], axis=1)

    layer = "Linear" if way.layer == "Parameter" else way.layer
    m = TorchModule(module, layer, total, way.inputs, {}, weight, {})
    if site.use == "other" and layer == "Linear" and not parameter:
        raise AdapterError(
            f"{site.path!r} of shape {site.shape} is neither multiplied nor looked up: PEFT has no such layer.\n"
            "  use lk.save_adapter"
        )
    if place.outputs:
        setting, leaves = _joined(name, places, sites, factors, total, form)
    else:
        setting = site.setting
        leaves = _leaves(site, way, factors[site.path], place.at, form)
    try:
        if not experts:
            tensors = form.write(m, setting, leaves)
            parts = [tensors]
        else:
            each = [_leaves(site, way, factors[site.path], (e,), form) for e in range(site.shape[site.axes.stack[0]])]
            leaves = each[0]
            parts = [form.write(m, setting, x) for x in each]
        if parameter:
            if site.dropout:
                raise AdapterError(
                    f"{site.path!r} has dropout {site.dropout}; PEFT has none for parameters of experts."
                )
            assert form.together is not None
            tensors = form.together(parts)
    except AdapterError:
        raise
    except LoraxError as e:
        raise AdapterError(f"{site.path!r}: {e}") from None
    return Written(m, form, setting, leaves, module, tensors, name if parameter else None)


def _way(site: Site, name: str, torch: Names, form: PeftForm) -> Way:
    candidates = ways(
        site.path,
        site.shape,
        site.axes.stack,
        (site.axes, site.use),
        not name.endswith(".weight"),
        site.path in torch.inputs_first,
    )
    way = next((w for w in candidates if w.layer in form.layers and w.axes == site.axes), None)
    if way is None:
        kinds = ", ".join(sorted(form.layers))
        raise AdapterError(
            f"{site.path!r} of shape {site.shape} is used as {site.use!r}; PEFT's {form.peft_type} adapts only "
            f"{kinds}.\n"
            "  use lk.save_adapter"
        )
    return way


def _leaves(site: Site, way: Way, leaves: Any, index: tuple[int, ...], form: PeftForm) -> dict[str, Any]:
    axes = form.axes_of(site.setting)
    return {name: from_site(site, way, axes[name], x, index) for name, x in leaves._asdict().items() if x is not None}


def _joined(
    name: str, places: list[Place], sites: Mapping[str, Site], factors: FactorTree, total: int, form: PeftForm
) -> tuple[Any, dict[str, Any]]:
    """Several sites as one of the sum of their ranks: rows of `a` one below the other, `b` block by block."""
    mine = [p for p in places if p.path in sites]
    settings = [sites[p.path].setting for p in mine]
    kinds = {s.kind for s in settings}
    parts = [factors[p.path]._asdict() for p in mine]
    odd = sorted({k for part in parts for k, x in part.items() if x is not None} - {"a", "b"})
    if len(kinds) > 1 or not form.product or odd:
        raise AdapterError(
            f"{name!r} is fused of {len(places)} parameters, and {kinds.pop()}{f' with {odd[0]}' if odd else ''} "
            "cannot be joined.\n  use lk.save_adapter"
        )
    first = settings[0]
    rows_a, rows_b, rank = [], [], 0
    for place, setting, part in zip(mine, settings, parts, strict=True):
        assert place.outputs is not None
        site = sites[place.path]
        a, b = (np.asarray(part[k]).reshape(site.rank, -1) for k in "ab")
        block = np.zeros((site.rank, total), b.dtype)
        factor = setting.scale / first.scale
        block[:, slice(*place.outputs)] = b if factor == 1 else b * b.dtype.type(factor)
        rows_a.append(a)
        rows_b.append(block)
        rank += site.rank
    alpha = first.scale * (rank**0.5 if first.rslora else rank)  # type: ignore[attr-defined]
    same = len({(s.rank, s.alpha, s.rslora) for s in settings}) == 1  # type: ignore[attr-defined]
    if same and not first.rslora:  # type: ignore[attr-defined]
        alpha = first.effective_alpha * len(settings)  # type: ignore[attr-defined]
    setting = replace(first, rank=rank, alpha=alpha)  # type: ignore[call-arg]
    return setting, {"a": np.concatenate(rows_a), "b": np.concatenate(rows_b)}


def _tie(entry: Written, site: Site, torch: Names) -> None:
    """The heads that an adapted embedding serves too."""
    if not site.lookup:
        return
    others = torch.tied(site.path, site.use if site.use == "tied" or torch.also[site.path] is not None else None)
    if not others or entry.form.ties == "always":
        return
    if entry.form.ties != "asked":
        raise AdapterError(
            f"{site.path!r} is {entry.module.name + '.weight'!r} and {others[0]!r} in torch: PEFT adapts one of them "
            f"by {site.setting.kind}, and both move here.\n  use lk.save_adapter, or adapt it by LoRA"
        )
    for other in others:
        m = entry.module._replace(
            name=other.removesuffix(".weight"),
            layer="Linear",
            outputs=entry.module.size,
            inputs=(entry.module.outputs,),
        )
        leaves = {"a": entry.leaves["b"], "b": entry.leaves["a"]}
        if entry.leaves.get("a0") is not None:
            leaves |= {"a0": entry.leaves["b0"], "b0": entry.leaves["a0"]}
        entry.head_modules.append(m.name)
        entry.heads |= {f"{m.name}.{end}": x for end, x in entry.form.write(m, entry.setting, leaves).items()}


def _nest(module: str, group: list[Written], out: dict[str, Written]) -> None:
    """PEFT wraps a module once for each adapted parameter, the first of them innermost."""
    shapes = [{end: x.shape for end, x in one.tensors.items()} for one in group]
    if len(group) > 1 and any(x == y for i, x in enumerate(shapes) for y in shapes[:i]):
        raise AdapterError(
            f"parameters of {module!r} have equal shapes, and PEFT does not store whose tensors are whose.\n"
            "  use lk.save_adapter"
        )
    for depth, one in enumerate(reversed(group)):
        one.prefix = module + ".base_layer" * depth
        out[str(one.parameter)] = one
