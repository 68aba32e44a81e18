"""A tiny LLaMA as a Hugging Face folder and as a GGUF file, written without the package's own names of tensors."""

import json

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from lorax_kit.models import Tokenizer

D, F, HEADS, SHARED, SIZE = 32, 64, 4, 2, 8
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("1", "2")]
SPECIAL = ["<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES), "<file>"]

CONFIG = {
    "model_type": "llama",
    "vocab_size": len(TOKENS),
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": SHARED,
    "max_position_embeddings": 16,
    "rope_theta": 1000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

METADATA = {
    "general.architecture": "llama",
    "general.name": "tiny",
    "llama.block_count": 2,
    "llama.context_length": 16,
    "llama.embedding_length": D,
    "llama.feed_forward_length": F,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": SHARED,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1000.0,
    "llama.rope.dimension_count": SIZE,
    "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, *[1] * (len(TOKENS) - 3), 4],
    "tokenizer.ggml.merges": [" ".join(x) for x in MERGES],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": "{{ messages }}",
}

# Shape in torch's layout, Hugging Face's name, llama.cpp's name.
LAYER = [
    ((D,), "input_layernorm", "attn_norm"),
    ((D, D), "self_attn.q_proj", "attn_q"),
    ((SHARED * SIZE, D), "self_attn.k_proj", "attn_k"),
    ((SHARED * SIZE, D), "self_attn.v_proj", "attn_v"),
    ((D, D), "self_attn.o_proj", "attn_output"),
    ((D,), "post_attention_layernorm", "ffn_norm"),
    ((F, D), "mlp.gate_proj", "ffn_gate"),
    ((F, D), "mlp.up_proj", "ffn_up"),
    ((D, F), "mlp.down_proj", "ffn_down"),
]
TABLE = [
    ((len(TOKENS), D), "model.embed_tokens.weight", "token_embd.weight"),
    ((D,), "model.norm.weight", "output_norm.weight"),
    ((len(TOKENS), D), "lm_head.weight", "output.weight"),
    *(
        (shape, f"model.layers.{i}.{theirs}.weight", f"blk.{i}.{ggml}.weight")
        for i in range(2)
        for shape, theirs, ggml in LAYER
    ),
]


def weights():
    """Every tensor by its Hugging Face name, in torch's layout."""
    rng = np.random.default_rng(0)
    return {name: (rng.normal(size=shape) / 4).astype(np.float32) for shape, name, _ in TABLE}


def write_folder(folder, tensors=None, **config):
    """Returns the weights, by their names."""
    tensors = weights() if tensors is None else tensors
    config = {k: v for k, v in {**CONFIG, **config}.items() if v != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    Tokenizer.from_merges(TOKENS, MERGES, special=SPECIAL).inner.save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def permuted(w, heads):
    """Rows of query or key as llama.cpp stores them: i and i + K/2 of a head side by side."""
    return np.concatenate(
        [h.reshape(2, -1, w.shape[1]).transpose(1, 0, 2).reshape(h.shape) for h in np.split(w, heads)]
    )


def write_gguf(file, change=lambda metadata, tensors: None, types=()):
    """A GGUF file of `weights()`; `types` maps names of tensors to the block types they are stored in."""
    found, types = weights(), dict(types)
    tensors = {ggml: found[name] for _, name, ggml in TABLE}
    for i in range(2):
        for part, heads in (("attn_q", HEADS), ("attn_k", SHARED)):
            tensors[f"blk.{i}.{part}.weight"] = permuted(tensors[f"blk.{i}.{part}.weight"], heads)
    metadata = dict(METADATA)
    change(metadata, tensors)
    writer = gguf.GGUFWriter(file, metadata.pop("general.architecture"))
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        kinds.get(type(value), writer.add_array)(key, value)
    for name, x in tensors.items():
        kind = types.get(name)
        writer.add_tensor(name, x if kind is None else gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
