"""`save_peft`: an adapter as a PEFT folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_kit.checkpoint.adapter import check_finite, named_arrays, plan_of
from lorax_kit.checkpoint.tensors import write_tensors
from lorax_kit.core.leaves import FactorTree, check_factors
from lorax_kit.core.paths import Params, flatten, is_array
from lorax_kit.core.plan import Plan
from lorax_kit.core.specs.spec import Spec
from lorax_kit.errors import AdapterError
from lorax_kit.files.reading import read_whole
from lorax_kit.files.staging import refuse_existing, staged
from lorax_kit.peft.folder.config import check_task, targets_for, with_pattern
from lorax_kit.peft.folder.files import CONFIG, PREFIX, ROOT, WEIGHTS, config_digest, write_json
from lorax_kit.peft.names import Names
from lorax_kit.peft.whole import kept
from lorax_kit.peft.write import Written, written


def save_peft(
    path: str | Path,
    plan: Plan | Spec,
    factors: FactorTree,
    /,
    *,
    base: Params,
    names: Mapping[str, Any],
    base_model: str | None = None,
    task_type: str | None = None,
    auto_mapping: Mapping[str, str] | None = None,
    overwrite: bool = False,
    **older: Any,
) -> None:
    """Write an adapter as a PEFT folder, for `peft.PeftModel.from_pretrained(model, path)`.

    The folder appears whole or not at all. Ranks, alphas and scales are kept exactly, arrays bit for bit;
    `start`, `freeze_a` and `compute_dtype` of the spec have no place in the format, nor has a dropout of the methods
    that have none in PEFT (HRA, LoHa, LoKr). Factors that began at a start of
    their own (PiSSA and others) are written as the plain LoRA of twice the rank that they are on the unchanged base.

    Args:
      path: folder to create.
      plan: what the factors adapt, from `lk.resolve`. The call of earlier versions, `save_peft(path, spec, factors,
        ..., plan=plan)`, still works, with a warning.
      factors: the trained tree.
      base: the frozen params. PEFT trains modules, not parameters: where only some parameters of a module are
        trained in full, its others are written as they stand here.
      names: path of a parameter -> its name in the torch model; see `load_peft`. Of what is trained in full, a matrix
        called `kernel` is (in, out) here and (out, in) there; `embedding` and `weight` have one layout.
      base_model: name or path of the torch model, for PEFT's AutoPeftModel, which needs one of the next two as well.
      task_type: "CAUSAL_LM", "SEQ_CLS", ...: PEFT's class for it.
      auto_mapping: {"base_model_class": ..., "parent_library": ...} where the model has no task.
      overwrite: replace an existing folder, if nothing else lies in it (as PEFT's README.md does); otherwise it is
        an error.

    Raises:
      AdapterError: the path exists; a parameter without a name; factors that do not fit or are not finite; what PEFT
        cannot express: two methods, dropouts or kinds of scale in one adapter, a module both adapted and trained in
        full, one parameter that serves two modules of which PEFT would move one.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> import lorax_kit as lk
      >>> base = {"q": {"kernel": jnp.ones((4, 3))}}
      >>> plan = lk.resolve(lk.Spec({"q/kernel": lk.LoRA(rank=2, alpha=4)}), base)
      >>> factors = {"q/kernel": lk.Factors(jnp.ones((2, 4)), jnp.ones((2, 3)))}
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> lk.save_peft(folder, plan, factors, base=base, names={"q/kernel": "q_proj.weight"})
      >>> lk.load_peft(folder, base=base, names={"q/kernel": "q_proj.weight"}).plan.site("q/kernel").scale
      2.0
    """
    path = Path(path).absolute()
    read_whole(lambda path: refuse_existing(path, overwrite, CONFIG, own={CONFIG, WEIGHTS}))(path)
    check_task(task_type, auto_mapping)
    plan = plan_of(plan, base, older, "save_peft")
    check_factors(plan, factors)
    check_finite(named_arrays(factors))
    named = {p: x for p, x in flatten(base)[0].items() if is_array(x)}
    torch = Names(names, named, plan)
    for p in plan.trained:
        torch.need(p)
    modules = written(plan, factors, torch, named)
    whole = kept(plan, factors, torch, named, modules)
    config: dict[str, Any] = {
        "task_type": task_type,
        "auto_mapping": None if auto_mapping is None else dict(auto_mapping),
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "modules_to_save": sorted(whole.modules | whole.heads) or None,
        "bias": whole.bias,
    }
    tensors = {f"{PREFIX}{name}": x for name, x in whole.tensors.items()}
    main = {name: m for name, m in modules.items() if m.beside is None}
    extra, shared = _methods_keys(main)
    config |= extra
    tensors |= {f"{ROOT}{name}": x for name, x in shared.items()}
    if any(m.module.layer == "Conv1D" for m in modules.values()):
        config["fan_in_fan_out"] = True
    if config["bias"] is None:
        del config["bias"]
    config |= _targets(main, {name.removesuffix(".weight") for name in torch.places if name.endswith(".weight")})
    for m in modules.values():
        tensors |= {f"{PREFIX}{m.prefix}.{end}": x for end, x in m.tensors.items()}
        tensors |= {f"{PREFIX}{name}": x for name, x in m.heads.items()}
        if m.beside is not None:
            key, value = m.beside
            config[key] = config.get(key) or {}
            config[key][m.module.name] = value
    if whole.heads or any(m.heads for m in modules.values()):
        config["ensure_weight_tying"] = True
    with staged(path, overwrite) as new:
        new.mkdir()
        write_json(new / CONFIG, config)
        write_tensors(new / WEIGHTS, tensors, config_digest(new))


def _methods_keys(modules: Mapping[str, Written]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the form of the one method has to say, values by module as patterns; and tensors of the whole adapter."""
    form = next(iter(modules.values())).form
    keys = {name: form.config(m.module, m.setting, m.leaves) for name, m in modules.items()}
    keys |= {head: keys[name] for name, m in modules.items() for head in m.head_modules}
    out: dict[str, Any] = {"peft_type": form.peft_type}
    for key in dict.fromkeys(k for own in keys.values() for k in own):
        values = {name: own[key] for name, own in keys.items()}
        pattern = form.patterns.get(key)
        if pattern is not None:
            out[key], out[pattern] = with_pattern({name: number(x) for name, x in values.items()})
            continue
        different = {repr(x): name for name, x in values.items()}
        if len(different) > 1:
            (one, first), (two, second) = list(different.items())[:2]
            raise AdapterError(
                f"PEFT has one {key} for all modules; here it is {one} at {first!r} and {two} at {second!r}.\n"
                "  use lk.save_adapter, or one value"
            )
        out[key] = next(iter(values.values()))
    shared: dict[str, np.ndarray] = {}
    if form.share is not None:
        shared, more = form.share({name: (m.module, m.setting, m.leaves, m.tensors) for name, m in modules.items()})
        out |= more
    return out, shared


def number(x: Any) -> Any:
    """PEFT declares alpha as an integer; whole numbers are written as such."""
    return int(x) if isinstance(x, float) and x == int(x) else x


def _targets(modules: Mapping[str, Written], known: set[str]) -> dict[str, Any]:
    experts = sorted({m.parameter for m in modules.values() if m.parameter is not None})
    plain = {m.module.name for m in modules.values() if m.parameter is None}
    plain |= {head for m in modules.values() for head in m.head_modules}  # or PEFT would not look for ties
    out: dict[str, Any] = {"target_modules": targets_for(plain, known)}
    return out | {"target_parameters": experts} if experts else out
