"""What PEFT's adapter_config.json says: which modules are adapted, by which rank and alpha. No arrays here.

A name of a module is torch's: `encoder.layer.0.attention.self.query`. The rules of matching are PEFT's own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from lorax_kit.core.errors import AdapterError, SpecError
from lorax_kit.core.paths import closest
from lorax_kit.methods import DoRA, LoRA

CONFIG = "adapter_config.json"
_READ = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("init_lora_weights", "task_type"),
}
# These say where an adapter came from or how to run or initialise it, never what it computes.
_INERT = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "fan_in_fan_out"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core"),
    *("qalora_group_size", "runtime_config"),
}
# The others (pissa, olora, corda, loftq, ...) also move the base weights that the factors are added to.
_INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
# PEFT adds these by itself, whether the model has them or not.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a PEFT LoRA folder, refused where it says something that no factors can express.

    Raises:
      AdapterError: no such file, not JSON, another method than LoRA, a setting that has no counterpart.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise AdapterError(
            f"{str(folder)!r} is not a PEFT adapter: it has no {CONFIG}.\n  PEFT's save_pretrained makes it"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise AdapterError(f"{str(file)!r} is not JSON: {e}.") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{str(file)!r} must hold an object, not {type(config).__name__}.")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{str(file)!r} has peft_type {config.get('peft_type')!r}; only 'LORA' can be read.")
    if config.get("init_lora_weights", True) not in _INITS_THAT_KEEP_THE_BASE:
        raise AdapterError(
            f"{str(file)!r} has init_lora_weights {config['init_lora_weights']!r}, which also changed the base.\n"
            "  convert it in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    for key, value in config.items():
        if key not in _READ | _INERT and value not in (None, False, "none", [], {}):
            raise AdapterError(
                f"{str(file)!r} has {key} {value!r}, which has no counterpart here: without it the adapter would "
                "compute something else.\n  train it with the default, or merge it in PEFT and load the merged weights"
            )
    _check_types(file, config)
    return config


def _check_types(file: Path, config: Mapping[str, Any]) -> None:
    """What is walked through below; `LoRA` itself checks ranks, alphas and dropout."""
    kinds: dict[str, tuple[type, ...]] = {
        "rank_pattern": (dict,),
        "alpha_pattern": (dict,),
        "use_rslora": (bool,),
        "use_dora": (bool,),
        "target_modules": (str, list),
        "exclude_modules": (str, list),
        "layers_pattern": (str, list),
        "modules_to_save": (list,),
        "layers_to_transform": (int, list),
    }
    for key, kind in kinds.items():
        value, element = config.get(key), int if key == "layers_to_transform" else str
        ok = value is None or isinstance(value, kind)
        if not ok or (isinstance(value, list) and not all(isinstance(x, element) for x in value)):
            raise AdapterError(f"{str(file)!r} has {key} {value!r}, which is malformed.")


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _suffix(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _matches(pattern: str, name: str, around: str = "{}") -> re.Match[str] | None:
    """Whether a pattern of the config, with what PEFT puts around it, matches a whole name."""
    try:
        return re.fullmatch(around.replace("{}", pattern), name)
    except re.error as e:
        raise AdapterError(f"{CONFIG} has the pattern {pattern!r}, not a regular expression: {e}.") from None


def _layer(config: Mapping[str, Any], name: str) -> int | None:
    """The number of the layer that a module lies in: the first one, or the one after a name in layers_pattern."""
    patterns = _listed(config.get("layers_pattern"))
    around = r"(?:|.*?\.){}\.(\d+)\..*" if patterns else r".*?\.{}\.(\d+)\..*"
    for pattern in patterns or [r"[^.]*"]:
        found = _matches(pattern, name, around)
        if found:
            return int(found.groups()[-1])
    return None


def targeted(config: Mapping[str, Any], modules: Collection[str]) -> set[str] | None:
    """Which of a model's modules the config adapts, or None where it leaves that to PEFT ("all-linear").

    Raises:
      AdapterError: a target that is no module of the model, a layer that does not exist.
    """
    wanted = config.get("target_modules")
    if wanted is None or wanted == "all-linear":
        return None
    hits: set[str] = set()
    for entry in [wanted] if isinstance(wanted, str) else wanted:
        found = {n for n in modules if (_matches(entry, n) if isinstance(wanted, str) else _suffix(n, entry))}
        if not found:
            raise AdapterError(
                f"{CONFIG} targets {entry!r}, which is no module of this base.\n"
                f"  closest: {closest(entry, sorted(modules))}\n"
                "  is it the adapter of another model, or does `names` lack a prefix or a module?"
            )
        hits |= found
    layers = config.get("layers_to_transform")
    if layers is not None and layers != [] and not isinstance(wanted, str):
        layers = [layers] if isinstance(layers, int) else layers
        by_name = {name: _layer(config, name) for name in hits}
        absent = sorted(set(layers) - set(by_name.values()))
        if absent:
            raise AdapterError(
                f"{CONFIG} has layers_to_transform {layers}: layer {absent[0]} has no targeted module in this base.\n"
                f"  layers found: {sorted({n for n in by_name.values() if n is not None})}"
            )
        hits = {name for name, layer in by_name.items() if layer in layers}
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str):
        hits = {name for name in hits if not _matches(excluded, name)}
    elif excluded:
        hits = {name for name in hits if not any(_suffix(name, entry) for entry in excluded)}
    saved = config.get("modules_to_save") or ()
    return {name for name in hits if not any(_matches(entry, name, r"(|.*\.){}(|\..*)") for entry in saved)}


def kept_whole(config: Mapping[str, Any], name: str) -> str | None:
    """The entry of modules_to_save by which PEFT trains a parameter in full, or None."""
    parts = name.split(".")
    owners = [".".join(parts[:i]) for i in range(1, len(parts))]
    # As in PEFT: the end of a name, not a whole part of it.
    return next((m for m in config.get("modules_to_save") or () if any(o.endswith(m) for o in owners)), None)


def check_kept(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise `AdapterError` if an entry of modules_to_save has no tensor among `names`."""
    used = {kept_whole(config, name) for name in names}
    own = _HEADS.get(str(config.get("task_type")), ())
    for entry in config.get("modules_to_save") or ():
        if entry not in used and entry not in own:
            raise AdapterError(f"{CONFIG} has {entry!r} in modules_to_save, but no tensor of it was saved.")


def setting_of(config: Mapping[str, Any], module: str, dtype: str) -> LoRA | DoRA:
    """Rank, alpha and the rest of one module, from the first pattern that matches it."""

    def of(patterns: str, default: str, fallback: int) -> Any:
        for pattern, value in (config.get(patterns) or {}).items():
            if _matches(pattern, module, r"(.*\.)?({})"):
                return value
        return config.get(default, fallback)

    try:
        return (DoRA if config.get("use_dora") else LoRA)(
            rank=of("rank_pattern", "r", 8),
            alpha=of("alpha_pattern", "lora_alpha", 8),
            rslora=bool(config.get("use_rslora")),
            dropout=config.get("lora_dropout") or 0.0,
            dtype=dtype,
        )
    except SpecError as e:
        raise AdapterError(f"{CONFIG} at {module!r}: {e}") from None


def make_config(
    settings: Mapping[str, Any], saved: Collection[str], modules: Collection[str], base_model: str | None
) -> dict[str, Any]:
    """The config that gives each module of `settings` its rank and scale, exactly.

    Args:
      settings: of every adapted module.
      saved: modules trained in full.
      modules: all modules of the model that are known, so that no pattern also hits another one.
      base_model: name or path of the base model.

    Raises:
      AdapterError: settings that PEFT has only one of differ; a module trained in full that PEFT would confuse
        with another.
    """
    for key, word in (("kind", "method"), ("rslora", "rslora"), ("dropout", "dropout")):
        values = {getattr(s, key): name for name, s in settings.items()}
        if len(values) > 1:
            (one, first), (two, second) = list(values.items())[:2]
            raise AdapterError(
                f"PEFT has one {word} for all modules; here it is {one!r} at {first!r} and {two!r} at {second!r}.\n"
                "  use lk.save_adapter, or one value"
            )
    for name in saved:
        for other in sorted({*modules, *settings} - {name}):
            if other.endswith(name):
                raise AdapterError(f"PEFT's modules_to_save takes {name!r} for the end of {other!r}, and trains both.")
        if name in settings:
            raise AdapterError(
                f"{name!r} is adapted and also has a parameter trained in full: PEFT does one or the other.\n"
                "  use lk.save_adapter, or leave one out"
            )
    # The most common value becomes the default, so that the patterns are few.
    ranks = {name: s.rank for name, s in settings.items()}
    alphas = {name: _number(s.rank if s.alpha is None else s.alpha) for name, s in settings.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    targets: str | list[str] = sorted(settings)
    if any(_suffix(other, name) for name in targets for other in set(modules) - set(settings)):
        targets = f"({'|'.join(re.escape(name) for name in targets)})"
    first_setting = next(iter(settings.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(name): a for name, a in alphas.items() if a != alpha},
        "target_modules": targets,
        "modules_to_save": sorted(saved) or None,
        "use_rslora": first_setting.rslora,
        "use_dora": first_setting.kind == "dora",
        "lora_dropout": first_setting.dropout,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "bias": "none",
    }


def _number(x: float) -> int | float:
    """PEFT declares alpha as an integer; whole numbers are written as such."""
    return int(x) if x == int(x) else x


def _exactly(name: str) -> str:
    """A regular expression that PEFT matches against this name alone."""
    return f"^{re.escape(name)}"
