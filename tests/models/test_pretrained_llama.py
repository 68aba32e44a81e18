"""Loading of LLaMA folders and SmolLM2: what is read, what is refused, and what the message says."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax_kit.core.paths import flatten
from lorax_kit.models import (
    LlamaConfig,
    LlamaModel,
    MissingPackageError,
    Tokenizer,
    llama_names,
    load_bert,
    load_llama,
)
from tests.models import llama_files as tiny
from tests.models.test_pretrained import tensors
from tests.models.test_pretrained import write_folder as write_bert

EXPECTED = LlamaConfig.from_dict(tiny.CONFIG)
UP = "model.layers.1.mlp.up_proj.weight"


def assert_holds(loaded, weights):
    named, _ = flatten(loaded.params)
    names = llama_names(loaded.config)
    assert set(named) == set(names)
    for path, x in named.items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x.T if path.endswith("kernel") else x, weights[names[path]], err_msg=path)


def split_in_two(folder):
    """model.safetensors becomes two parts and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"part-1.safetensors": sorted(tensors)[:5], "part-2.safetensors": sorted(tensors)[5:]}
    for part, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / part)
    index = {"metadata": {}, "weight_map": {name: part for part, names in parts.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_a_folder_on_disk_loads_and_runs(tmp_path):
    weights = tiny.write_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}]})
    )
    loaded = load_llama(tmp_path)
    assert (loaded.config, loaded.chat_template, loaded.source) == (EXPECTED, "y", str(tmp_path))
    assert_holds(loaded, weights)
    ones = np.ones((1, 3), np.int32)
    shapes = jax.eval_shape(LlamaModel(EXPECTED).init, jax.random.key(0), ones, ones)["params"]
    assert jax.tree.map(np.shape, loaded.params) == jax.tree.map(np.shape, shapes)


def test_parts_bfloat16_old_frequencies_and_a_tied_head(tmp_path):
    weights = {name: x.astype(ml_dtypes.bfloat16) for name, x in tiny.weights().items() if name != "lm_head.weight"}
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    tiny.write_folder(tmp_path, weights | frequencies, tie_word_embeddings=True)
    split_in_two(tmp_path)
    loaded = load_llama(tmp_path)
    assert "head" not in loaded.params
    assert_holds(loaded, {name: x.astype(np.float32) for name, x in weights.items()})


def test_a_folder_of_parts_serves_bert_as_well(tmp_path):
    write_bert(tmp_path)
    whole = load_bert(tmp_path)
    split_in_two(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load_bert(tmp_path).params, whole.params)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": "absent", "rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"}},
        {"rope_scaling": None, "head_dim": 8, "mlp_bias": False, "hidden_act": "silu", "torch_dtype": "bfloat16"},
        {"rope_scaling": {"type": "default"}},
    ],
)
def test_configs_that_mean_the_same(config):
    found = {k: v for k, v in {**tiny.CONFIG, **config}.items() if v != "absent"}
    assert LlamaConfig.from_dict(found) == EXPECTED


def test_what_an_old_config_leaves_out():
    absent = ("num_key_value_heads", "rope_theta", "tie_word_embeddings", "model_type")
    config = LlamaConfig.from_dict({k: v for k, v in tiny.CONFIG.items() if k not in absent})
    assert (config.num_key_value_heads, config.rope_theta, config.tie_word_embeddings) == (4, 1e4, False)


def config(**changes):
    return lambda folder: tiny.write_folder(folder, **changes)


def index(change):
    def damage(folder):
        found = split_in_two(folder)
        change(found)
        (folder / "model.safetensors.index.json").write_text(json.dumps(found))

    return damage


BAD_FOLDERS = [
    (lambda f: (f / "config.json").unlink(), FileNotFoundError, "has no config.json; a model folder holds"),
    (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "has no model.safetensors"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), ValueError, "is not a tokenizer"),
    (lambda f: (f / "config.json").write_text("[]"), ValueError, "config.json must be an object, not list"),
    (lambda f: (f / "config.json").write_bytes(b"\xff"), ValueError, "config.json' is not JSON"),
    (config(hidden_size="absent"), ValueError, "config.json lacks hidden_size."),
    (
        config(num_attention_heads="absent", num_key_value_heads=None),
        ValueError,
        "lacks num_attention_heads, num_key_v",
    ),
    (config(model_type="bloom"), ValueError, "model_type 'bloom'; known here are bert, "),
    (config(model_type="qwen2", use_sliding_window=True), ValueError, "computes no window of some layers"),
    (config(hidden_act="gelu"), ValueError, "hidden_act 'gelu'; this decoder computes only 'silu'"),
    (config(attention_bias=True), ValueError, "no tensor 'model.layers.0.self_attn.q_proj.bias'"),
    (config(mlp_bias=True), ValueError, "no tensor 'model.layers.0.mlp.gate_proj.bias'"),
    (
        config(head_dim=16),
        ValueError,
        "gives shape (32, 32) to 'layer_0/attention/query/kernel', config.json says (32, 6",
    ),
    (config(rope_scaling={"type": "linear", "factor": 2.0}), ValueError, "computes only unscaled positions"),
    (
        config(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        ValueError,
        "'rope_type': 'llama3', 'factor': 8.0}; this decoder computes only unscaled positions, or 'llama3' with fac",
    ),
    (
        config(rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        ValueError,
        "'rope_type': 'yarn', 'factor': 4.0}; this decoder computes only unscaled positions, or 'llama3'",
    ),
    (config(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), ValueError, "only unscaled positions"),
    (config(num_key_value_heads=3), ValueError, "3 key and value heads do not divide 4 heads into groups"),
    (config(num_hidden_layers=3), ValueError, "has no tensor 'model.layers.2.input_layernorm.weight'"),
    (config(num_hidden_layers=10**9), ValueError, "has 21 tensors, config.json says 1000000000 layers"),
    (
        config(num_hidden_layers=1),
        ValueError,
        "that this model does not use: 'model.layers.1.input_layernorm.weight', ",
    ),
    (config(tie_word_embeddings=True), ValueError, "has tensors that this model does not use: 'lm_head.weight'."),
    (
        config(num_key_value_heads=4),
        ValueError,
        "gives shape (32, 16) to 'layer_0/attention/key/kernel', config.json says (32",
    ),
    (tensors(lambda t: t.pop(UP)), ValueError, f"has no tensor '{UP}', which 'layer_1/mlp/up/kernel' needs"),
    (tensors(lambda t: t.update({UP: t[UP][:-1]})), ValueError, "gives shape (32, 63) to 'layer_1/mlp/up/kernel'"),
    (tensors(lambda t: t.update({UP: t[UP].astype(np.int8)})), ValueError, f"'{UP}' holds int8, not floats"),
    (
        tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)})),
        ValueError,
        "has tensors that this model does not use: 'model.layers.0.self_attn.q_proj.bias'.",
    ),
    (index(lambda i: i.pop("weight_map")), ValueError, "has no weight_map from tensors to files of its folder"),
    (
        index(lambda i: i["weight_map"].update({UP: "../x"})),
        ValueError,
        "has no weight_map from tensors to files of its",
    ),
    (
        index(lambda i: i["weight_map"].update({UP: "x"})),
        FileNotFoundError,
        "has no x, which model.safetensors.index.json",
    ),
    (
        index(lambda i: i["weight_map"].update(x="part-1.safetensors")),
        ValueError,
        "part-1.safetensors holds 'x'; it does not",
    ),
]


@pytest.mark.parametrize(("damage", "error", "says"), BAD_FOLDERS)
def test_bad_folders_say(tmp_path, damage, error, says):
    tiny.write_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=re.escape(says)):
        load_llama(tmp_path)


@pytest.fixture(scope="module")
def smollm2():
    try:
        return load_llama()
    except (MissingPackageError, ImportError) as e:
        pytest.skip(f"SmolLM2 is installed by make llama ({e})")


def test_smollm2_is_what_its_authors_say(smollm2):
    assert smollm2.config == LlamaConfig()
    assert sum(x.size for x in jax.tree.leaves(smollm2.params)) == 134_515_008
    assert isinstance(smollm2.tokenizer, Tokenizer)
    assert "<|im_start|>" in smollm2.chat_template


def test_smollm2_knows_the_capital_of_france(smollm2):
    (ids,) = smollm2.tokenizer.encode(["The capital of France is"], 16)
    apply = jax.jit(LlamaModel(smollm2.config).apply)
    for _ in range(2):
        padded = np.zeros((1, 8), np.int32)
        padded[0, : len(ids)] = ids
        logits = apply({"params": smollm2.params}, padded, np.arange(8)[None] < len(ids))
        ids.append(int(np.argmax(logits[0, len(ids) - 1])))
    assert smollm2.tokenizer.decode(ids) == "The capital of France is Paris."
