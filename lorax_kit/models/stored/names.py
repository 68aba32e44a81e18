"""Names of parameters in Hugging Face's models, from the content of a config.json: for PEFT folders, both ways.

Paths are those that a model of ours would have: layer_0/attention/query/kernel, kernels (in, out). With `stacked` the
layers are one scanned parameter, layers/attention/query/kernel, and the torch name has `{}` for the layer. Whoever
calls a parameter otherwise gives a dict of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorax_kit.core.paths import TorchName

ROBERTAS = ("roberta", "xlm-roberta", "camembert")
"""Model types of RoBERTa's architecture."""

_LLAMA = {
    "attention/norm/scale": "input_layernorm",
    "attention/query/kernel": "self_attn.q_proj",
    "attention/key/kernel": "self_attn.k_proj",
    "attention/value/kernel": "self_attn.v_proj",
    "attention/output/kernel": "self_attn.o_proj",
    "mlp/norm/scale": "post_attention_layernorm",
    "mlp/gate/kernel": "mlp.gate_proj",
    "mlp/up/kernel": "mlp.up_proj",
    "mlp/down/kernel": "mlp.down_proj",
}
_QWEN3 = {"attention/query_norm/scale": "self_attn.q_norm", "attention/key_norm/scale": "self_attn.k_norm"}
_BERT = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "attention/norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp/norm": "output.LayerNorm",
}
_DISTILBERT = {
    "attention/query": "attention.q_lin",
    "attention/key": "attention.k_lin",
    "attention/value": "attention.v_lin",
    "attention/output": "attention.out_lin",
    "attention/norm": "sa_layer_norm",
    "mlp/up": "ffn.lin1",
    "mlp/down": "ffn.lin2",
    "mlp/norm": "output_layer_norm",
}
_GPT2 = {
    "attention/norm": "ln_1",
    "attention/qkv": "attn.c_attn",
    "attention/output": "attn.c_proj",
    "mlp/norm": "ln_2",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}


def _layers(count: Any, stacked: bool, theirs: str) -> list[tuple[str, str]]:
    """(our prefix, torch's prefix) of each layer, or of all at once."""
    if stacked:
        return [("layers", f"{theirs}.{{}}")]
    return [(f"layer_{i}", f"{theirs}.{i}") for i in range(int(count))]


def _both(ours: str, theirs: str, *, inputs_first: bool = False) -> dict[str, str]:
    """Weight and bias of a module."""
    if ours.endswith("norm"):
        return {f"{ours}/scale": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}
    weight = TorchName(f"{theirs}.weight", inputs_first=inputs_first)
    return {f"{ours}/kernel": weight, f"{ours}/bias": f"{theirs}.bias"}


def decoder_names(config: Mapping[str, Any], *, stacked: bool = False) -> dict[str, str]:
    """Of LLaMA, Mistral, Qwen2, Qwen3 and Gemma (their ForCausalLM): path -> torch name.

    Args:
      config: the content of config.json: model_type, num_hidden_layers, tie_word_embeddings, the flags of biases.
      stacked: all layers are one scanned parameter.

    Raises:
      ValueError: another architecture.

    Example:
      >>> config = {"model_type": "qwen2", "num_hidden_layers": 1, "tie_word_embeddings": True}
      >>> decoder_names(config, stacked=True)["layers/attention/query/bias"]
      'model.layers.{}.self_attn.q_proj.bias'
    """
    kind = _known(config, ("llama", "mistral", "qwen2", "qwen3", "gemma"))
    tied = bool(config.get("tie_word_embeddings", kind == "gemma"))
    table = TorchName("model.embed_tokens.weight", also=("lm_head.weight",) if tied else ())
    names: dict[str, str] = {"embeddings/embedding": table, "norm/scale": "model.norm.weight"}
    biased = ["query", "key", "value"] if kind == "qwen2" or config.get("attention_bias") else []
    biased += ["output"] if kind != "qwen2" and config.get("attention_bias") else []
    gated = ["gate", "up", "down"] if config.get("mlp_bias") else []
    for ours, theirs in _layers(config["num_hidden_layers"], stacked, "model.layers"):
        for leaf, module in (_LLAMA | (_QWEN3 if kind == "qwen3" else {})).items():
            names[f"{ours}/{leaf}"] = f"{theirs}.{module}.weight"
        for part, own in (("attention", biased), ("mlp", gated)):
            for name in own:
                names[f"{ours}/{part}/{name}/bias"] = f"{theirs}.{_LLAMA[f'{part}/{name}/kernel']}.bias"
    return names if tied else names | {"head/kernel": "lm_head.weight"}


def encoder_names(config: Mapping[str, Any], *, stacked: bool = False, prefix: str = "") -> dict[str, str]:
    """Of BERT's, RoBERTa's and DistilBERT's encoder: path -> torch name.

    Args:
      config: the content of config.json.
      stacked: all layers are one scanned parameter.
      prefix: "bert.", "roberta." or "distilbert." of a model with a head.

    Raises:
      ValueError: another architecture.
    """
    distilled = _known(config, ("bert", *ROBERTAS, "distilbert")) == "distilbert"
    tables = {"word": "word", "position": "position"} | ({} if distilled else {"type": "token_type"})
    # The head of a masked language model is tied to the words, but no part of the encoder.
    names: dict[str, str] = {
        f"embeddings/{x}/embedding": TorchName(f"{prefix}embeddings.{y}_embeddings.weight", also=())
        for x, y in tables.items()
    }
    names |= _both("embeddings/norm", f"{prefix}embeddings.LayerNorm")
    count = config["n_layers"] if distilled else config["num_hidden_layers"]
    for ours, theirs in _layers(count, stacked, f"{prefix}{'transformer' if distilled else 'encoder'}.layer"):
        for module, name in (_DISTILBERT if distilled else _BERT).items():
            names |= _both(f"{ours}/{module}", f"{theirs}.{name}")
    return names


def gpt2_names(
    config: Mapping[str, Any], *, stacked: bool = False, split: bool = False, prefix: str = "transformer."
) -> dict[str, str]:
    """Of GPT-2's LMHeadModel: path -> torch name; its matrices are (in, out) there, too.

    Args:
      config: the content of config.json.
      stacked: all layers are one scanned parameter.
      split: query, key and value are parameters of their own here; torch has one c_attn of all three.
      prefix: "" of GPT2Model, which has no head.

    Raises:
      ValueError: another architecture; both `stacked` and `split`.
    """
    _known(config, ("gpt2",))
    if stacked and split:
        raise ValueError("stacked and split are one too many: a fused part of stacked layers has no name.")
    width = int(config.get("n_embd", 768))
    tied = bool(config.get("tie_word_embeddings", True)) and bool(prefix)
    names: dict[str, str] = {
        "embeddings/token/embedding": TorchName(f"{prefix}wte.weight", also=("lm_head.weight",) if tied else ()),
        "embeddings/position/embedding": TorchName(f"{prefix}wpe.weight", also=()),
    }
    names |= _both("norm", f"{prefix}ln_f")
    for ours, theirs in _layers(config.get("n_layer", 12), stacked, f"{prefix}h"):
        for module, name in _GPT2.items():
            module_names = _both(f"{ours}/{module}", f"{theirs}.{name}", inputs_first=True)
            if split and module == "attention/qkv":
                module_names = {}
                for i, part in enumerate(("query", "key", "value")):
                    for leaf, end in (("kernel", "weight"), ("bias", "bias")):
                        text = f"{theirs}.{name}.{end}[{i * width}:{(i + 1) * width}]"
                        module_names[f"{ours}/attention/{part}/{leaf}"] = TorchName(text, inputs_first=leaf == "kernel")
            names |= module_names
    return names if tied or not prefix else names | {"head/kernel": "lm_head.weight"}


def t5_names(config: Mapping[str, Any], *, stacked: bool = False) -> dict[str, str]:
    """Of T5's ForConditionalGeneration, gated or not: path -> torch name.

    The embedding serves the encoder, the decoder and, unless tie_word_embeddings is false, the head: PEFT cannot move
    them as one.

    Raises:
      ValueError: another architecture.
    """
    _known(config, ("t5", "mt5"))
    tied = bool(config.get("tie_word_embeddings", True))
    also = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *(("lm_head.weight",) if tied else ()))
    names: dict[str, str] = {"embeddings/embedding": TorchName("shared.weight", also=also)}
    gated = "gated" in str(config.get("feed_forward_proj", "relu"))
    mlp = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
    for side, count in (("encoder", config["num_layers"]), ("decoder", config.get("num_decoder_layers"))):
        blocks = _layers(config["num_layers"] if count is None else count, stacked, f"{side}.block")
        parts = {"attention": "SelfAttention"} | ({"cross": "EncDecAttention"} if side == "decoder" else {})
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names[f"{side}/relative/embedding"] = TorchName(bias, also=())
        names[f"{side}/norm/scale"] = f"{side}.final_layer_norm.weight"
        for ours, theirs in blocks:
            for i, (part, module) in enumerate(parts.items()):
                names[f"{side}/{ours}/{part}/norm/scale"] = f"{theirs}.layer.{i}.layer_norm.weight"
                for name, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
                    names[f"{side}/{ours}/{part}/{name}/kernel"] = f"{theirs}.layer.{i}.{module}.{letter}.weight"
            last = f"{theirs}.layer.{len(parts)}"
            names[f"{side}/{ours}/mlp/norm/scale"] = f"{last}.layer_norm.weight"
            for name, letter in mlp.items():
                names[f"{side}/{ours}/mlp/{name}/kernel"] = f"{last}.DenseReluDense.{letter}.weight"
    return names if tied else names | {"head/kernel": "lm_head.weight"}


def marian_names(config: Mapping[str, Any], *, stacked: bool = False) -> dict[str, str]:
    """Of Marian's MTModel, whose embedding serves the encoder, the decoder and the head: path -> torch name.

    Raises:
      ValueError: another architecture.
    """
    _known(config, ("marian",))
    also = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
    names: dict[str, str] = {
        "embeddings/embedding": TorchName("model.shared.weight", also=also),
        "final_logits_bias": "final_logits_bias",
    }
    projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
    for side in ("encoder", "decoder"):
        parts = {"attention": "self_attn"} | ({"cross": "encoder_attn"} if side == "decoder" else {})
        for ours, theirs in _layers(config[f"{side}_layers"], stacked, f"model.{side}.layers"):
            modules = {f"{part}/{x}": f"{name}.{y}" for part, name in parts.items() for x, y in projections.items()}
            modules |= {f"{part}/norm": f"{name}_layer_norm" for part, name in parts.items()}
            modules |= {"mlp/up": "fc1", "mlp/down": "fc2", "mlp/norm": "final_layer_norm"}
            for module, name in modules.items():
                names |= _both(f"{side}/{ours}/{module}", f"{theirs}.{name}")
    return names


def _known(config: Mapping[str, Any], kinds: tuple[str, ...]) -> str:
    kind = config.get("model_type")
    if kind not in kinds:
        raise ValueError(f"config.json has model_type {kind!r}; these are the names of {', '.join(kinds)}.")
    return str(kind)
