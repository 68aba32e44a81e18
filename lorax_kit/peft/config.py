"""What adapter_config.json says: every key is used, noted because it changes nothing here, or refused with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_kit.core.errors import AdapterError
from lorax_kit.core.method import METHODS, Method, PeftForm
from lorax_kit.peft.files import CONFIG, read_json
from lorax_kit.peft.targets import by_module

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
        if form is not None and form.peft_type == kind:
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
            if not (isinstance(value, int | float) and not isinstance(value, bool)) and not (
                isinstance(value, list) and all(type(x) is bool for x in value)
            ):
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
