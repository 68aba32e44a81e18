"""What adapter_config.json says: every key is used, noted because it changes nothing here, or refused with a reason.

Which modules of a torch model it adapts or keeps whole follows PEFT's own rules of matching, and they are not alike: a
list of targets matches the ends of names at a dot, or a whole name whatever its layer; a string is a regular expression
of the whole name; modules_to_save matches any end of a name, dot or not.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from lorax_kit.core.method import METHODS, Method
from lorax_kit.core.paths import closest
from lorax_kit.errors import AdapterError
from lorax_kit.peft.folder.files import CONFIG, read_json
from lorax_kit.peft_form import PeftForm

# These say where an adapter came from or how to run it, never what it computes.
_INERT = {
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("fan_in_fan_out", "runtime_config", "megatron_config", "megatron_core", "qalora_group_size", "task_type"),
    *("target_modules_to_tie", "modules_to_tie", "layers_pattern"),
}
_LISTS: dict[str, tuple[type, ...]] = {
    "target_modules": (str, list),
    "exclude_modules": (str, list),
    "layers_pattern": (str, list),
    "modules_to_save": (list,),
    "layers_to_transform": (int, list),
    "target_parameters": (list,),
}
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""What PEFT adds to modules_to_save by itself, whether the model has it or not."""
TABLES = ("embed_tokens", "lm_head")
"""Without one of these names among the targets, PEFT does not look for ties."""
_HANDLED = {*_LISTS, "bias", "ensure_weight_tying", "trainable_token_indices"}
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_NOTHING = (None, False, "none", "None", 0, "")


class Config:
    """A config, read.

    Attributes:
      data: the object of the file.
      method, form: of its peft_type.
      beside: key of the config -> the method of the modules that it names (trainable tokens).
      notes: what changes nothing here, a line each.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / CONFIG
        if not file.is_file():
            raise AdapterError(
                f"{str(folder)!r} is not a PEFT adapter: it has no {CONFIG}.\n  PEFT's save_pretrained makes it"
            )
        self.file, self.data, self.notes = file, read_json(file), list[str]()
        _check_types(file, self.data)
        self.method, self.form = method_for(file, self.data)
        self.beside = {
            form.beside[self.form.peft_type][1]: method
            for method in METHODS.values()
            if (form := method.peft) is not None and self.form.peft_type in form.beside
        }
        self._account()

    def _account(self) -> None:
        form = self.form
        used = {*form.keys, *form.patterns.values(), *_INERT, *_HANDLED}
        for key, value in self.data.items():
            empty = value in _NOTHING or value == [] or value == {}
            if empty:
                continue
            if key in form.refused:
                raise self.refusal(key, form.refused[key])
            if key in form.training:
                self.notes.append(f"{key} {value!r} changes the training alone")
            elif key not in used:
                raise self.refusal(key, "which has no counterpart here")
        bias = self.data.get("bias")
        if bias not in (None, "none", "all", form.bias) or (bias == "all" and form.bias is None):
            raise self.refusal("bias", f"which {form.peft_type} does not have")

    def refusal(self, key: str, why: str) -> AdapterError:
        """An error about one key."""
        return AdapterError(
            f"{str(self.file)!r} has {key} {short(self.data.get(key))}: {why}.\n"
            "  train it with the default, or merge it in PEFT and load the merged weights"
        )

    def of(self, form: PeftForm, module: str) -> dict[str, Any]:
        """The keys that a form asks for, patterns looked up."""
        out = {}
        for key, default in form.keys.items():
            value = self.data.get(key, default)
            pattern = form.patterns.get(key)
            patterns = (self.data.get(pattern) if pattern else None) or {}
            out[key] = by_module(patterns, module, value)
        return out


def method_for(file: Path, data: Mapping[str, Any]) -> tuple[Method, PeftForm]:
    """The method whose form a config names."""
    kind = data.get("peft_type")
    known = {method.peft.peft_type: None for method in METHODS.values() if method.peft is not None}
    for method in METHODS.values():
        form = method.peft
        if form is None or form.peft_type != kind:
            continue
        if all(bool(data.get(key, form.keys.get(key))) == bool(value) for key, value in form.when.items()):
            return method, form
    which = ", ".join(known)
    if kind == "BONE":
        raise AdapterError(
            f"{str(file)!r} has peft_type 'BONE', which PEFT itself reads no more: it is MISS now.\n"
            "  rename it to 'MISS', and the tensors from bone_block to miss_block"
        )
    if kind in known:
        raise AdapterError(f"{str(file)!r} has a variant of {kind} that cannot be read.")
    raise AdapterError(f"{str(file)!r} has peft_type {short(kind)}; those that can be read: {which}.")


def short(value: Any) -> str:
    """A value for a message, in one line of ordinary length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_types(file: Path, data: Mapping[str, Any]) -> None:
    """What is walked through elsewhere; a method's setting checks its own ranks, alphas and dropout."""
    for key, kinds in _LISTS.items():
        value, element = data.get(key), int if key == "layers_to_transform" else str
        ok = value is None or (isinstance(value, kinds) and not isinstance(value, bool))
        if not ok or (isinstance(value, list) and not all(type(x) is element for x in value)):
            raise AdapterError(f"{str(file)!r} has {key} {short(value)}, which is malformed.")
    for key, value in data.items():
        ok = True
        if key.endswith("_pattern") and key != "layers_pattern":
            ok = value is None or isinstance(value, dict)
        elif key.startswith("use_") or key in ("ensure_weight_tying", "lora_bias", "inference_mode"):
            ok = value is None or isinstance(value, bool) or (key == "use_bdlora" and isinstance(value, dict))
        elif key in ("r", "init_r", "lora_alpha", "alpha", "mini_r"):
            ok = isinstance(value, int | float) and not isinstance(value, bool)
        elif key in ("lora_dropout", "task_type", "peft_type", "bias"):
            ok = value is None or isinstance(value, str if key[0] in "tpb" else int | float)
        elif key in ("trainable_token_indices", "token_indices"):
            lists = list(value.values()) if isinstance(value, dict) else [value]
            ok = value is None or all(isinstance(x, list) and all(type(i) is int for i in x) for x in lists)
        if not ok:
            raise AdapterError(f"{str(file)!r} has {key} {short(value)}, which is malformed.")
    for key in ("rank_pattern", "alpha_pattern", "lambda_pattern"):
        for name, value in (data.get(key) or {}).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            mask = key == "rank_pattern" and isinstance(value, list) and all(type(x) is bool for x in value)
            if not number and not mask:
                raise AdapterError(f"{str(file)!r} has {key} {name!r}: {short(value)}, which is malformed.")


def check_task(task_type: str | None, auto_mapping: Mapping[str, str] | None) -> None:
    """Raise `AdapterError` unless PEFT knows them."""
    if task_type is not None and task_type not in TASKS:
        raise AdapterError(f"task_type is {task_type!r}; PEFT knows {', '.join(TASKS)}.")
    if auto_mapping is not None and set(auto_mapping) != {"base_model_class", "parent_library"}:
        raise AdapterError(
            f"auto_mapping is {auto_mapping!r}; it must hold base_model_class and parent_library,\n"
            "  such as 'BertModel' and 'transformers.models.bert.modeling_bert'"
        )


def listed(value: str | list[str] | None) -> list[str]:
    """A text or a list of them as a list."""
    return [value] if isinstance(value, str) else list(value or ())


def moves_ties(config: Mapping[str, Any]) -> bool:
    """Whether PEFT moves a tied head with its embedding: where asked to, and if a name that it knows is among them."""
    if not config.get("ensure_weight_tying"):
        return False
    targets = config.get("target_modules")
    if isinstance(targets, str) and any(compiled(targets).fullmatch(name) for name in TABLES):
        return True
    entries = [*(targets if isinstance(targets, list) else ()), *(config.get("modules_to_save") or ())]
    return any(entry.split(".")[-1] in TABLES for entry in entries)


def ends(name: str, entry: str) -> bool:
    """Whether a name is the entry, or ends in it at a dot."""
    return name == entry or name.endswith(f".{entry}")


def compiled(pattern: str, around: str = "{}") -> re.Pattern[str]:
    """A pattern of the config with what PEFT puts around it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of "[[": it means what it means to PEFT
            return re.compile(around.replace("{}", pattern))
    except (re.error, RecursionError, OverflowError) as e:
        raise AdapterError(f"{CONFIG} has the pattern {pattern[:80]!r}, not a regular expression: {e}.") from None


def by_module(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that is a module's name, or the end of it at a dot."""
    for pattern, value in patterns.items():
        if compiled(pattern, r"(.*\.)?({})$").match(name):
            return value
    return default


def layer_of(config: Mapping[str, Any], name: str) -> int | None:
    """The number of the layer that a module lies in: the first one, or the one after a name in layers_pattern."""
    patterns = listed(config.get("layers_pattern"))
    for pattern in patterns or [r"[^.]*"]:
        match = compiled(pattern, r"(?:^|.*?\.){}\.(?P<idx>\d+)\." if patterns else r".*?\.{}\.(?P<idx>\d+)\.").match(
            name
        )
        if match:
            return int(match["idx"])
    return None


def targeted(config: Mapping[str, Any], modules: Collection[str], notes: list[str]) -> set[str] | None:
    """Which of a model's modules the config adapts; None where it leaves that to PEFT ("all-linear").

    Args:
      notes: gets a line for each entry that matches nothing, which PEFT passes over.

    Raises:
      AdapterError: no entry matches anything.
    """
    wanted = config.get("target_modules")
    if wanted is None or (isinstance(wanted, str) and wanted.lower() == "all-linear"):
        return None
    whole = compiled(wanted) if isinstance(wanted, str) else None
    hits = {n for n in modules if (whole.fullmatch(n) if whole else any(ends(n, entry) for entry in wanted))}
    if wanted and not hits:
        entry = listed(wanted)[0]
        raise AdapterError(
            f"{CONFIG} targets {entry!r}, which is no module of this base.\n"
            f"  closest: {closest(entry, sorted(modules))}\n"
            "  is it the adapter of another model, or does `names` lack a prefix or a module?"
        )
    for key in ("target_modules", "exclude_modules"):
        value = config.get(key)
        for entry in value if isinstance(value, list) else ():
            if not any(ends(n, entry) for n in modules):
                notes.append(f"{key} has {entry!r}, which matches nothing")
    layers = config.get("layers_to_transform")
    if layers is not None and layers != []:
        if whole:
            notes.append("layers_to_transform is passed over where target_modules is a pattern")
        else:
            chosen = [layers] if isinstance(layers, int) else layers
            numbers = {name: layer_of(config, name) for name in hits}
            for layer in sorted(set(chosen) - {n for n in numbers.values() if n is not None}):
                notes.append(f"layers_to_transform has {layer}, where no module is targeted")
            hits = {name for name in hits if name in wanted or numbers[name] in chosen}
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str) and excluded:
        without = compiled(excluded)
        hits = {name for name in hits if not without.fullmatch(name)}
    elif excluded:
        hits = {name for name in hits if not any(ends(name, entry) for entry in excluded)}
    saved = [compiled(entry, r"(^|.*\.){}($|\..*)") for entry in config.get("modules_to_save") or ()]
    return {name for name in hits if not any(pattern.match(name) for pattern in saved)}


def targeted_parameters(config: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """Which parameters target_parameters names, by their whole name or its end at a dot."""
    entries = config.get("target_parameters") or ()
    return {name for name in names if any(ends(name, entry) for entry in entries)}


def unmatched_parameters(config: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Notes on the entries of target_parameters that match nothing, which PEFT passes over."""
    entries = config.get("target_parameters") or ()
    return [
        f"target_parameters has {x!r}, which matches nothing" for x in entries if not any(ends(n, x) for n in names)
    ]


def kept_whole(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT trains a parameter in full, by modules_to_save."""
    return any(_keeps(entry, name) for entry in config.get("modules_to_save") or ())


def _keeps(entry: str, name: str) -> bool:
    parts = name.split(".")
    # As in PEFT: the end of a name, not a whole part of it.
    return any(".".join(parts[:i]).endswith(entry) for i in range(1, len(parts)))


def check_kept(config: Mapping[str, Any], names: Collection[str], notes: list[str]) -> None:
    """Raise `AdapterError` at an entry of modules_to_save without a tensor; note the heads that PEFT lists itself."""
    own = HEADS.get(str(config.get("task_type")), ())
    for entry in config.get("modules_to_save") or ():
        if any(_keeps(entry, name) for name in names):
            continue
        if entry not in own:
            raise AdapterError(f"{CONFIG} has {entry!r} in modules_to_save, but no tensor of it was saved.")
        notes.append(f"modules_to_save has {entry!r}, of which no tensor was saved")


def exactly(name: str) -> str:
    """A regular expression that PEFT matches against this name alone."""
    return f"^{re.escape(name)}"


def targets_for(wanted: Collection[str], modules: Collection[str]) -> str | list[str]:
    """target_modules that take these modules and no other: their names, or a pattern where one ends as another."""
    names = sorted(wanted)
    if any(ends(other, name) for name in names for other in set(modules) - set(names)):
        return f"({'|'.join(re.escape(name) for name in names)})"
    return names


def with_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, so that patterns are few, and patterns for the modules of another."""
    default = Counter(values.values()).most_common(1)[0][0]
    return default, {exactly(name): x for name, x in values.items() if x != default}
