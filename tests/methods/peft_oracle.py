"""What a recorded PEFT folder makes of the base's weights: by the papers' formulas, in float64, without the package."""

import json
import re

import numpy as np
from safetensors.numpy import load_file

from tests.fixtures.recorded_methods import CASES, PEFT_METHODS, folder
from tests.methods import formulas as f

_LEAF = re.compile(r"(.+)\.((?:lora|hada|lokr|vera|miss|delora|hra|ia3)_\w+(?:\.weight|\.bias)?)")


def merged(case):
    """Weights and biases of the torch model by name, float64, as PEFT's `merge_and_unload` leaves them.

    A tied head that the adapter unties is there as `lm_head.weight`.
    """
    kind, config = CASES[case], json.loads((folder(case) / "adapter_config.json").read_text())
    weights = {n: x.astype(float) for n, x in load_file(PEFT_METHODS / f"weights_{kind}.safetensors").items()}
    if kind == "llama":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    leaves, shared = {}, {}
    tensors = load_file(folder(case) / "adapter_model.safetensors")
    for key, x in sorted(tensors.items()):
        x, name = x.astype(float), key.removeprefix("base_model.").removeprefix("model.")
        found = _LEAF.fullmatch(name)
        if name in ("vera_A", "vera_B"):
            shared[name] = x
        elif found:
            leaves.setdefault(found[1], {})[found[2].removesuffix(".weight")] = x
        elif name.endswith(".token_adapter.trainable_tokens_delta"):
            _put_tokens(weights, name.partition(".token_adapter")[0] + ".weight", config, x)
        elif name.replace(".base_layer.", ".") in weights:
            weights[name.replace(".base_layer.", ".")] = x  # a bias, a module in full, or a copy of the base
        else:  # PEFT's leftovers of a module in full whose biases are trained too
            assert re.search(r"\.(modules_to_save|original_module)\.bias$", name)
    if config["peft_type"] == "VERA" and not shared:
        a, b = f.vera_draws(config["r"], *_largest(weights, leaves), seed=config["projection_prng_key"])
        shared = {"vera_A": a.astype(float), "vera_B": b.T.astype(float)}
    for module, found in leaves.items():
        if config.get("target_parameters"):
            _adapt_experts(weights, module, found, config)
        else:
            _adapt(weights, module, found, config, shared, kind)
    return weights


def _put_tokens(weights, name, config, rows):
    indices = config["trainable_token_indices"]
    if isinstance(indices, dict):
        (indices,) = indices.values()
    for target in (name, "lm_head.weight") if "lm_head.weight" in weights else (name,):
        weights[target] = weights[target].copy()
        weights[target][indices] = rows


def _largest(weights, leaves):
    shapes = [weights[f"{module}.weight"].shape for module in leaves]
    return max(s[1] for s in shapes), max(s[0] for s in shapes)


def _setting(config, key, patterns, module):
    """PEFT's value for a module: of the first pattern that is the module's name or the end of it."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return config[key]


def _scale(config, module):
    rank = _setting(config, "r", "rank_pattern", module)
    alpha = _setting(config, "lora_alpha" if "lora_alpha" in config else "alpha", "alpha_pattern", module)
    return f.lora_scale(rank, alpha, rslora=config.get("use_rslora", False))


def _adapt(weights, module, t, config, shared, kind):
    stored, bias = weights[f"{module}.weight"], weights.get(f"{module}.bias")
    as_is = "lora_embedding_A" in t or (kind == "gpt" and not re.search(r"\.(k|head)$", module))
    w = stored if as_is else stored.reshape(len(stored), -1).T
    w, bias = _methods(config, w, bias, t, shared, module, stored.shape)
    weights[f"{module}.weight"] = w if as_is else w.T.reshape(stored.shape)
    if bias is not None:
        weights[f"{module}.bias"] = bias


def _methods(config, w, bias, t, shared, module, shape):
    match config["peft_type"]:
        case "LORA":
            a = t.get("lora_A", t.get("lora_embedding_A"))
            b = t.get("lora_B", t.get("lora_embedding_B"))
            a, b, scale = a.reshape(len(a), -1), b.reshape(len(b), -1).T, _scale(config, module)
            # PEFT makes these starts anew when it loads, and takes them from the base.
            if config["init_lora_weights"] == "pissa":
                w = w - f.svd_part(w, len(a))
            elif config["init_lora_weights"] == "olora":
                a0, b0 = f.olora(w, len(a))
                w = w - scale * a0.T @ b0
            if "lora_magnitude_vector" in t:
                return f.dora(w, a, b, t["lora_magnitude_vector"].ravel(), scale), bias
            moved = f.lora_bias(bias, t["lora_B.bias"], scale) if "lora_B.bias" in t else bias
            return f.lora(w, a, b, scale), moved
        case "ADALORA":
            scale = config["lora_alpha"] / (config["init_r"] + 1e-5)
            return f.adalora(w, t["lora_A"], t["lora_E"].ravel(), t["lora_B"].T, scale), bias
        case "VERA":
            a, b = shared["vera_A"][:, : len(w)], shared["vera_B"][: w.shape[1]].T
            return f.vera(w, a, b, t["vera_lambda_d"], t["vera_lambda_b"]), bias
        case "LOHA":
            pairs = []
            for k in "12":
                a, b, core = t[f"hada_w{k}_b"], t[f"hada_w{k}_a"], t.get(f"hada_t{k}")
                if core is not None:
                    a, b = np.einsum("ijhw,jc->ichw", core, a).reshape(len(core), -1), b.T
                pairs += [a, b.T]
            return f.loha(w, *pairs, float(np.float32(_scale(config, module)))), bias
        case "LOKR":
            halves = []
            for k in "12":
                if f"lokr_w{k}" in t:
                    whole = t[f"lokr_w{k}"]
                    halves.append(whole.reshape(len(whole), -1).T)
                    continue
                a, b, core = t[f"lokr_w{k}_b"], t[f"lokr_w{k}_a"], t.get("lokr_t2") if k == "2" else None
                if core is not None:
                    a, b = np.einsum("ijhw,jc->ichw", core, a).reshape(len(core), -1), b.T
                halves.append((a, b.T))
            return f.lokr(w, *halves, _scale(config, module)), bias
        case "MISS":
            return (f.miss_bat if t["miss_block"].ndim == 3 else f.miss)(w, t["miss_block"]), bias
        case "DELORA":
            return f.delora(w, t["delora_A"], t["delora_B"].T, t["delora_lambda"].item()), bias
        case "HRA":
            return f.hra(w, t["hra_u"].T, gram_schmidt=config["apply_GS"]), bias
        case "IA3":
            feedforward = any(module.endswith(name) for name in config["feedforward_modules"])
            gain = t["ia3_l"].ravel()
            if feedforward and len(shape) == 4:
                gain = gain.repeat(shape[2] * shape[3])  # a gain per input channel, for the whole window
            return f.ia3(w, gain, feedforward=feedforward, bias=bias)


def _adapt_experts(weights, module, t, config):
    """LoRA on parameters (E, out, in), or (E, in, out) where the module says so.

    The wrappers nest: the module's first targeted parameter is the innermost. The rows of lora_A are expert-major,
    the columns of lora_B rank-major.
    """
    base = module.replace(".base_layer", "")
    targets = [name for name in (f"{base}.up", f"{base}.down") if name in config["target_parameters"]]
    name = targets[len(targets) - 1 - module.count(".base_layer")]
    w, rank = weights[name], config["r"]
    count, transposed = len(w), base == "transposed"
    a = t["lora_A"].reshape(count, rank, -1)
    b = t["lora_B"].reshape(-1, rank, count)
    new = []
    for e in range(count):
        matrix = f.lora(w[e] if transposed else w[e].T, a[e], b[:, :, e].T, _scale(config, name))
        new.append(matrix if transposed else matrix.T)
    weights[name] = np.stack(new)
