"""Tiny pretrained models as folders, with the words of a text as their vocabulary."""

import json

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models, normalizers, pre_tokenizers, processors

from lorax_kit.models.stored.names import decoder_names, encoder_names

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 3,
}


def tokenizer(words, encoder):
    ids = {word: i for i, word in enumerate([*SPECIAL, *sorted(set(words))])}
    inner = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    inner.add_special_tokens(SPECIAL)
    if encoder:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return inner


def shape_of(name, config):
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    last = name.split(".")[-2:]
    if "embeddings" in name or "embed_tokens" in name:
        rows = {"word": v, "position": config.get("max_position_embeddings"), "token": config.get("type_vocab_size")}
        return (d,) if "LayerNorm" in name else (rows.get(last[0].split("_")[0], v), d)
    wide = ("intermediate", "gate_proj", "up_proj")
    out = f if any(x in name for x in wide) else d
    if last[-1] == "bias":
        return (out,)
    if "orm" in name:
        return (d,)
    shared = config.get("num_key_value_heads", 0) * d // config["num_attention_heads"]
    out = shared if "k_proj" in name or "v_proj" in name else out
    down = "down_proj" in name or ("output.dense" in name and "attention" not in name)
    return (out, f if down else d)


def write_model(folder, words, family="bert", seed=0, extra=None, **changes):
    """A folder of random weights; `extra` are further tensors."""
    folder.mkdir(parents=True)
    config = {**(BERT if family == "bert" else LLAMA), "vocab_size": len(SPECIAL) + len(set(words)), **changes}
    names = encoder_names(config) if family == "bert" else decoder_names(config)
    rng = np.random.default_rng(seed)
    tensors = {}
    for path, name in names.items():
        x = rng.normal(size=shape_of(name, config)) * 0.3
        tensors[str(name)] = (x + 1 if path.endswith("scale") else x).astype(np.float32)
    save_file({**tensors, **(extra or {})}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer(words, family == "bert").save(str(folder / "tokenizer.json"))
    return str(folder)
