"""The modules of a PEFT folder, each matched with our parameters and read by the form of its method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lorax_kit.core.lowrank import dense
from lorax_kit.core.method import Method
from lorax_kit.core.paths import closest
from lorax_kit.core.plan import Plan
from lorax_kit.core.site import Axes
from lorax_kit.errors import AdapterError, LoraxError
from lorax_kit.peft.folder.config import (
    Config,
    ends,
    moves_ties,
    short,
    targeted,
    targeted_parameters,
    unmatched_parameters,
)
from lorax_kit.peft.folder.files import CONFIG, WEIGHTS, Sorted
from lorax_kit.peft.layout import Way, matrix_of, ways
from lorax_kit.peft.names import Names, Place
from lorax_kit.peft.sites import Found, Pieces, Tensors
from lorax_kit.peft_form import FromPeft, PeftForm, TorchModule


class Reader:
    """Reads the modules of one folder.

    Attributes:
      adapted: torch names of the modules with tensors.
      biases: torch name of a bias -> (gain, shift) that the method also does to it.
    """

    def __init__(self, config: Config, torch: Names, named: Mapping[str, Any], plan: Plan | None) -> None:
        self.config, self.torch, self.named = config, torch, named
        self.sites = {} if plan is None else {site.path: site for site in plan.sites}
        self.adapted: set[str] = set()
        self.biases: dict[str, tuple[Any, Any]] = {}

    def read(self, tensors: Sorted) -> dict[str, Pieces]:
        """Path -> what was read of it.

        Raises:
          AdapterError: a module that config, names or base do not know or that lacks a tensor; shapes that do not fit;
            a tied parameter of which PEFT moved one use.
        """
        self._check_targets(tensors)
        matched, twins = list[Found](), list[tuple[str, str]]()
        for module, module_tensors in tensors.modules.items():
            base = module.replace(".base_layer", "")
            if self._experts(base):
                continue
            if twin := self.torch.twin(f"{module}.weight"):
                twins.append((module, twin))
                continue
            matched += self._found(module, f"{module}.weight", self.config.method, module_tensors)
        for base in dict.fromkeys(m.replace(".base_layer", "") for m in tensors.modules):
            matched += self._of_experts(base, tensors.modules)
        for key, modules in tensors.beside.items():
            for module, module_tensors in modules.items():
                matched += self._found(module, f"{module}.weight", self.config.beside[key], module_tensors, key)
        self._check_beside(tensors)
        shared: dict[str, Any] = {}
        form = self.config.form
        if form.shared is not None:
            shared = form.shared(self.config.of(form, ""), [f.module for f in matched], tensors.shared)
        for name in set(tensors.shared) - set(shared):
            raise AdapterError(f"{WEIGHTS} has the tensor {name!r}, which nothing here calls for.")
        out: dict[str, Pieces] = {}
        for match in matched:
            self._add(out, match, shared)
        self._check_ties(out, tensors, twins)
        return out

    def use(self, path: str, way: Way) -> str:
        """What a plan calls the use of a site."""
        site = self.sites.get(path)
        if site is not None and site.axes == way.axes:
            return site.use
        if way.layer == "Embedding":
            return "tied" if self.torch.also[path] else "lookup"
        return "other" if way.layer in ("Conv1d", "Conv2d", "Conv3d") else "product"

    def _check_targets(self, tensors: Sorted) -> None:
        data, known = self.config.data, self.torch.modules
        if not tensors.modules and not tensors.beside:
            raise AdapterError(f"{WEIGHTS} holds no factors: there is nothing to adapt.")
        plain = {m for m in tensors.modules if not self._experts(m.replace(".base_layer", ""))}
        for module in sorted(plain - known):
            raise AdapterError(
                f"{WEIGHTS} adapts {module!r}, which is no module of this base.\n"
                f"  closest: {closest(module, sorted(known))}\n"
                "  is it the adapter of another model, or does `names` lack a prefix or a module?"
            )
        wanted = targeted(data, known, self.config.notes)
        self.config.notes += unmatched_parameters(data, self.torch.places)
        if wanted is None:
            return
        wanted |= {name.removesuffix(".weight") for name in targeted_parameters(data, self.torch.places)}
        tied = {m for m in known if self.torch.twin(f"{m}.weight")}
        if data.get("ensure_weight_tying"):
            wanted |= plain & {m for m in plain if m.split(".")[-1] == "lm_head"}
        for module in sorted(plain - wanted - tied):
            raise AdapterError(f"{WEIGHTS} adapts {module!r}, which {CONFIG} does not target.")
        for module in sorted(wanted - plain - tied):
            if f"{module}.weight" in self.torch.places and self._adaptable(module):
                raise AdapterError(f"{WEIGHTS} has no factors for {module!r}, which {CONFIG} targets.")

    def _adaptable(self, module: str) -> bool:
        """Whether PEFT could adapt what a target's name matches: not a norm."""
        place = self.torch.places[f"{module}.weight"][0]
        return len(self.named[place.path].shape) - len(place.at) >= 2

    def _check_beside(self, tensors: Sorted) -> None:
        """Modules that the config names for another method have its tensors, and these alone."""
        for key in self.config.beside:
            value = self.config.data.get(key)
            have = tensors.beside.get(key, {})
            named = dict(value) if isinstance(value, dict) else {}
            for module in have:
                if value and isinstance(value, dict) and not any(ends(module, k) for k in named):
                    raise AdapterError(f"{WEIGHTS} has tensors of {module!r} that {key} in {CONFIG} does not name.")
            lacking = [k for k in named if not any(ends(module, k) for module in have)]
            if lacking or (value and not have):
                raise AdapterError(f"{WEIGHTS} has no tensor for {key} {short(lacking or value)}.")

    def _experts(self, module: str) -> list[str]:
        """Names of a module's parameters that target_parameters adapts, in the order of `names`."""
        entries = self.config.data.get("target_parameters")
        if not entries or self.config.form.apart is None:
            return []
        own = [n for n in self.torch.places if n.rpartition(".")[0] == module and not n.endswith(".weight")]
        return [n for n in own if any(ends(n, entry) for entry in entries)]

    def _of_experts(self, module: str, tensors: Mapping[str, Tensors]) -> list[Found]:
        """Parameters of a module, matched by shape with its nested wrappers."""
        parameters, form, out = self._experts(module), self.config.form, list[Found]()
        if not parameters:
            return out
        assert form.apart is not None
        layers = [m for m in tensors if m.replace(".base_layer", "") == module]
        if len(layers) != len(parameters):
            raise AdapterError(
                f"{WEIGHTS} adapts {len(layers)} parameters of {module!r}, {CONFIG} targets {len(parameters)}."
            )
        left = list(parameters)
        for layer in layers:
            fits = {}
            for name in left:
                path = self.torch.places[name][0].path
                shape = self.named[path].shape
                count = shape[0] if len(shape) == 3 else 1
                try:
                    parts = form.apart(tensors[layer], count)
                except (KeyError, ValueError):
                    continue
                matched = [
                    self._match(
                        Place(path, (e,) if len(shape) == 3 else (), None), name, self.config.method, part, None
                    )
                    for e, part in enumerate(parts)
                ]
                if all(isinstance(x, Found) for x in matched):
                    fits[name] = matched
            if len(fits) != 1:
                how = "in several ways: their shapes are equal" if fits else "no parameter of it"
                raise AdapterError(
                    f"the tensors of {layer!r} fit {how}; parameters targeted: {', '.join(map(repr, left))}.\n"
                    "  PEFT does not store which is whose; give plan=lk.resolve(...) where a matrix is square"
                )
            ((name, matched),) = fits.items()
            left.remove(name)
            out += [x for x in matched if isinstance(x, Found)]
        return out

    def _found(self, module: str, name: str, method: Method, tensors: Tensors, key: str | None = None) -> list[Found]:
        places = self.torch.places.get(name)
        if places is None:
            raise AdapterError(
                f"{WEIGHTS} adapts {module!r}, which is no module of this base.\n"
                f"  closest: {closest(module, sorted(self.torch.modules))}"
            )
        self.adapted.add(module)
        out = [self._match(place, name, method, tensors, key) for place in places]
        for x in out:
            if not isinstance(x, Found):
                raise AdapterError(x)
        return [x for x in out if isinstance(x, Found)]

    def _match(self, place: Place, name: str, method: Method, tensors: Tensors, key: str | None) -> Found | str:
        """How the tensors of a module fit the parameter at a place, or why they do not."""
        form, path = method.peft, place.path
        assert form is not None
        module, shape = name.removesuffix(".weight"), self.named[path].shape
        site = self.sites.get(path)
        parameter = not name.endswith(".weight")
        stack = self.torch.stack[path] or ((0,) if parameter and len(shape) == 3 else ())
        given = None if site is None else (site.axes, site.use)
        if given is not None and parameter and stack == (0,):  # PEFT's update is one matrix for each expert
            ins, outs = (tuple(i for i in x if i != 0) for x in (given[0].inputs, given[0].outputs))
            given = Axes(inputs=ins, outputs=outs, stack=(0,)), "product"
        config = self._config_of(form, name if parameter else module, key)
        if isinstance(config, str):
            return config
        fits, tried = list[Found](), list[tuple[int, str]]()
        for way in ways(path, shape, stack, given, parameter, path in self.torch.inputs_first):
            total = max((p.outputs[1] for p in self.torch.places[name] if p.outputs), default=way.outputs)
            first, last = place.outputs or (0, total)
            if way.layer not in form.layers or last - first != way.outputs:
                continue
            if place.outputs and not form.product:
                return f"{path!r} is a part of {name!r}, and {method.setting.kind} cannot be split by outputs."
            layer = "Linear" if way.layer == "Parameter" else way.layer
            dtype, weight = str(self.named[path].dtype), self._weight(name, place, way)
            m = TorchModule(module, layer, total, way.inputs, config, weight, {}, dtype)
            want = form.shapes(m, tensors)
            have = {end: x.shape for end, x in tensors.items()}
            if want == have:
                fits.append(Found(place, way, m, method, tensors, place == self.torch.places[name][-1]))
            else:
                tried.append(_misfit(module, want, have, path, shape, config))
        if given is None and len({f.way for f in fits}) > 1:
            return (
                f"the adapter's tensors fit {path!r} of shape {shape} in {len(fits)} ways: which axes are contracted?\n"
                "  say it by a plan: plan=lk.resolve(spec, params, apply_fn, *inputs)"
            )
        if not fits:
            none = f"{module!r} is {path!r} of shape {shape} here, and PEFT's {form.peft_type} has no such layer."
            return min(tried, default=(0, none), key=lambda pair: pair[0])[1]
        return fits[0]

    def _config_of(self, form: PeftForm, module: str, key: str | None) -> dict[str, Any] | str:
        config = self.config.of(form, module)
        if key is not None:
            value = self.config.data.get(key)
            if isinstance(value, dict):
                value = next((x for k, x in value.items() if ends(module, k)), None)
            if not value:
                given = short(self.config.data.get(key))
                return f"{WEIGHTS} has tensors of {module!r} for {key}, which is {given} in {CONFIG}."
            config |= dict.fromkeys(form.keys, value or [])
        for rank in ("r", "init_r"):
            if rank in config and (type(config[rank]) is not int or config[rank] < 1):
                return f"{CONFIG}: the rank of {module!r} is {config[rank]!r}; it must be an integer of at least 1."
        return config

    def _weight(self, name: str, place: Place, way: Way) -> Any:
        def weight() -> np.ndarray:
            if place.outputs is None:
                return matrix_of(way, dense(self.named[place.path]), place.at)
            parts = self.torch.places[name]
            return np.concatenate([matrix_of(way, dense(self.named[p.path]), p.at) for p in parts], axis=1)

        return weight

    def _add(self, out: dict[str, Pieces], match: Found, shared: Mapping[str, Any]) -> None:
        path, form = match.place.path, match.method.peft
        assert form is not None
        try:
            part: FromPeft = form.read(match.module._replace(shared=shared), match.tensors)
        except AdapterError:
            raise
        except LoraxError as e:
            raise AdapterError(f"{match.module.name!r}: {e}") from None
        if match.place.outputs is not None:
            rows = slice(*match.place.outputs)
            axes = form.axes_of(part.setting)
            cut = {k: x[..., rows] if axes[k].endswith("o") else x for k, x in part.leaves.items()}
            part = part._replace(leaves=cut)
        bias = f"{match.module.name}.bias"
        if match.last and (part.bias_gain is not None or part.bias_shift is not None):
            if bias not in self.torch.places and part.bias_shift is not None:
                raise AdapterError(f"{match.module.name!r} has a lora_bias, and this base has no {bias!r} to take it.")
            self.biases[bias] = part.bias_gain, part.bias_shift
        sizes = tuple(self.named[path].shape[i] for i in match.way.axes.stack)
        pieces = out.setdefault(path, Pieces(path, match.method, match.way, sizes))
        if pieces.method is not match.method or pieces.way != match.way or match.place.at in pieces.parts:
            raise AdapterError(f"{path!r} is adapted twice, which one parameter cannot be.")
        pieces.parts[match.place.at] = part
        pieces.dtypes |= {str(x.dtype) for x in match.tensors.values() if x.ndim > 1}

    def _check_ties(self, out: Mapping[str, Pieces], tensors: Sorted, twins: list[tuple[str, str]]) -> None:
        """One parameter that serves two modules must be moved alike in both."""
        asked, moved = moves_ties(self.config.data), {path for _, path in twins}
        for path, pieces in out.items():
            if pieces.way.layer != "Embedding":
                continue
            site = self.sites.get(path)
            others = self.torch.tied(path, None if site is None else site.use)
            if not others or pieces.form.ties == "always" or (pieces.form.ties == "asked" and (asked or path in moved)):
                continue
            name = self.torch.templates[path]
            raise AdapterError(
                f"PEFT adapts {name!r} alone, and here one parameter, {path!r}, is also {others[0]!r}.\n"
                "  load it over params whose head is apart, or train it with ensure_weight_tying=True"
            )
        for module, path in twins:
            if not self._same(module, out.get(path), tensors.modules):
                raise AdapterError(
                    f"PEFT moves {module!r} by itself, and here it is one parameter with {path!r}.\n"
                    "  load it over params whose head is apart"
                )

    def _same(self, module: str, pieces: Pieces | None, modules: Mapping[str, Tensors]) -> bool:
        """Whether a head's tensors are those of its embedding: of factors, inputs and outputs exchanged."""
        form, head = self.config.form, modules[module]
        if pieces is None or pieces.form is not form:
            return False
        if not form.product:
            table = modules[self.torch.templates[pieces.path].removesuffix(".weight")]
            return set(head) == set(table) and all(np.array_equal(x, table[end]) for end, x in head.items())
        (main,), way = pieces.parts.values(), pieces.way
        m = TorchModule(module, "Linear", way.inputs[0], (way.outputs,), self.config.of(form, module), lambda: None, {})
        if form.shapes(m, head) != {end: x.shape for end, x in head.items()}:
            return False
        leaves = form.read(m, head).leaves
        return all(np.array_equal(leaves[x], main.leaves[y]) for x, y in ("ab", "ba"))


def _misfit(
    module: str, want: Mapping[str, Any], have: Mapping[str, Any], path: str, shape: Any, config: Mapping[str, Any]
) -> tuple[int, str]:
    """How far the tensors of a module are from fitting, and what is wrong with them."""
    lacking, extra = sorted(set(want) - set(have)), sorted(set(have) - set(want))
    odd = len(lacking) + len(extra)
    if lacking:
        return odd, f"{module!r} has no {lacking[0]}, which its config and its other tensors call for."
    if extra:
        return odd, f"{module!r} has a {extra[0]} that its config and its other tensors do not call for."
    end = next(e for e in want if want[e] != have[e])
    rank = next((f" (rank {config[k]})" for k in ("r", "init_r") if k in config), "")
    return 0, (
        f"{module!r} has {end} of shape {have[end]}; its config{rank} and {path!r} of shape {shape} call for "
        f"{want[end]}.\n"
        "  load the base it was trained on; if axes are contracted in another order: plan=lk.resolve(...)"
    )
