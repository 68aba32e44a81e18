"""Loading of LLaMA folders, GGUF files and SmolLM2: what is read, what is refused, and what the message says."""

import builtins
import json
import re

import gguf
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
        "'rope_type': 'llama3', 'factor': 8.0}; this decoder computes only unscaled positions, or 'llama3' with factor, h",
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


def test_a_gguf_file_holds_the_same_model(tmp_path):
    loaded = load_llama(tiny.write_gguf(tmp_path / "x.gguf"))
    assert loaded.config == EXPECTED
    assert (loaded.chat_template, loaded.source) == ("{{ messages }}", str(tmp_path / "x.gguf"))
    assert_holds(loaded, tiny.weights())


def test_gguf_blocks_are_restored_and_a_tied_head_has_none(tmp_path):
    types = {
        "token_embd.weight": gguf.GGMLQuantizationType.Q8_0,
        "blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q4_1,
        "blk.1.ffn_down.weight": gguf.GGMLQuantizationType.F16,
        "blk.1.attn_k.weight": gguf.GGMLQuantizationType.BF16,
    }
    loaded = load_llama(tiny.write_gguf(tmp_path / "x.gguf", lambda m, t: t.pop("output.weight"), types))
    assert loaded.config.tie_word_embeddings
    expected = tiny.weights()
    for _, name, ggml in tiny.TABLE:
        if ggml in types:  # rows are quantised one by one: their order does not matter
            blocks = gguf.quants.quantize(expected[name], types[ggml])
            restored = gguf.quants.dequantize(blocks, types[ggml])
            assert 0 < np.abs(restored - expected[name]).max() < 0.1
            expected[name] = restored
    assert_holds(loaded, expected)


def test_the_tokenizer_of_a_gguf_file(tmp_path):
    def ends(metadata, tensors):
        metadata.update({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True})

    def gpt2(metadata, tensors):
        metadata["tokenizer.ggml.pre"] = "gpt-2"

    ids = {token: i for i, token in enumerate(tiny.TOKENS)}
    text = "<|im_start|>a the 12<file>é<|im_end|>"
    tokens = ["<|im_start|>", "a", "Ġthe", "Ġ", "1", "2", "<file>", "Ã", "©", "<|im_end|>"]
    smollm = load_llama(tiny.write_gguf(tmp_path / "1.gguf")).tokenizer
    assert smollm.encode([text, ""], 99) == [[ids[x] for x in tokens], []]
    assert smollm.decode([ids[x] for x in tokens]) == "a the 12<file>é"
    assert smollm.encode([text], 3) == [[ids[x] for x in tokens[:3]]]
    whole = load_llama(tiny.write_gguf(tmp_path / "2.gguf", gpt2)).tokenizer
    assert whole.encode(["a 12"], 9) == [[ids[x] for x in ("a", "Ġ", "12")]]
    ended = load_llama(tiny.write_gguf(tmp_path / "3.gguf", ends)).tokenizer
    assert ended.encode(["a the"], 9) == [[0, ids["a"], ids["Ġthe"], 1]]
    assert ended.encode(["a the"], 3) == [[0, ids["a"], 1]]


def metadata(**changes):
    """A change of the metadata; `_` stands for the dots of a key, None takes it out."""

    def change(found, tensors):
        for name, value in changes.items():
            key = name.replace("__", ".")
            found.update({key: value})
            if value is None:
                del found[key]

    return change


def stored(name, value):
    """A tensor in the place of another, or taken out."""
    return lambda found, tensors: tensors.pop(name) if value is None else tensors.update({name: value})


BAD_GGUF = [
    (metadata(general__architecture="qwen2"), "the file holds a 'qwen2'; this decoder is only 'llama'."),
    (metadata(llama__block_count=None), "the file lacks llama.block_count."),
    (
        metadata(llama__embedding_length=None, llama__context_length=None),
        "lacks llama.embedding_length, llama.context_le",
    ),
    (metadata(llama__logit_scale=2.0), "the file sets llama.logit_scale to 2.0, which this decoder does not know."),
    (
        metadata(llama__rope__scaling__type="linear"),
        "has llama.rope.scaling.type 'linear'; this decoder computes only 'none'",
    ),
    (metadata(llama__rope__scaling__factor=4.0), "sets llama.rope.scaling.factor to 4.0"),
    (metadata(llama__rope__dimension_count=4), "has llama.rope.dimension_count 4; this decoder computes only 8"),
    (metadata(llama__expert_count=8), "has llama.expert_count 8; this decoder computes only 0"),
    (metadata(llama__attention__head_count=5), "5 heads do not divide hidden_size 32"),
    (
        metadata(llama__block_count=3),
        "has no tensor 'blk.2.attn_norm.weight', which 'layer_2/attention/norm/scale' needs",
    ),
    (metadata(llama__block_count=2**31), "has 21 tensors, its metadata says 2147483648 layers"),
    (
        metadata(llama__block_count=1),
        "has tensors that this model does not use: 'blk.1.attn_k.weight', 'blk.1.attn_norm",
    ),
    (
        metadata(llama__vocab_size=9),
        f"gives shape ({len(tiny.TOKENS)}, 32) to 'embeddings/embedding', its metadata says (9, 32)",
    ),
    (metadata(tokenizer__ggml__model="llama"), "the file's tokenizer.ggml.model is 'llama', known are gpt2."),
    (metadata(tokenizer__ggml__pre="llama-bpe"), "tokenizer.ggml.pre is 'llama-bpe', known are smollm, gpt-2."),
    (metadata(tokenizer__ggml__merges=None), "lacks tokenizer.ggml.merges; only byte-level BPE tokenizers are read"),
    (metadata(tokenizer__ggml__merges=["a b c"]), "has a merge that is not of two tokens"),
    (metadata(tokenizer__ggml__merges=["a q"]), "these tokens and merges are not a tokenizer"),
    (metadata(tokenizer__ggml__token_type=[1]), f"the file has {len(tiny.TOKENS)} tokens and 1 types of tokens"),
    (metadata(tokenizer__ggml__add_bos_token=True, tokenizer__ggml__bos_token_id=999), "and has none: its id is 999"),
    (stored("blk.0.ffn_up.weight", None), "has no tensor 'blk.0.ffn_up.weight', which 'layer_0/mlp/up/kernel' needs"),
    (
        stored("blk.0.attn_q.weight", np.zeros((31, 32), np.float32)),
        "gives shape (32, 31) to 'layer_0/attention/query/kernel'",
    ),
    (stored("blk.0.attn_q.bias", np.zeros(32, np.float32)), "that this model does not use: 'blk.0.attn_q.bias'."),
    (stored("rope_freqs.weight", np.ones(4, np.float32)), "that this model does not use: 'rope_freqs.weight'."),
    (
        stored("output_norm.weight", np.ones(32, np.int8)),
        "'output_norm.weight' is of type I8, which gguf does not restore",
    ),
]


@pytest.mark.parametrize(("change", "says"), BAD_GGUF)
def test_bad_gguf_files_say(tmp_path, change, says):
    file = tiny.write_gguf(tmp_path / "x.gguf", change)
    with pytest.raises(ValueError, match=re.escape(says)):
        load_llama(file)


@pytest.mark.parametrize("length", [0, 3, 20, 200, 6000, -100])
def test_a_cut_gguf_file_is_damaged(tmp_path, length):
    file = tiny.write_gguf(tmp_path / "x.gguf")
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"x\.gguf' is damaged, or not a GGUF file"):
        load_llama(file)


def test_no_file_no_package_and_no_reader_name_the_next_step(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*none\.gguf'"):
        load_llama(tmp_path / "none.gguf")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_llama("smollm3")
    file = tiny.write_gguf(tmp_path / "x.gguf")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "gguf":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"install it: pip install 'lorax_kit\[llama\]'"):
        load_llama(file)


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
