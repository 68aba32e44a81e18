"""Loading of GGUF files: what is read, what is refused, and what the message says."""

import re

import gguf
import numpy as np
import pytest

from lorax_kit.models import load_llama
from tests.models import llama_files as tiny
from tests.models.test_pretrained_llama import EXPECTED, assert_holds


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
    (metadata(llama__block_count=2**31 - 1), "has 21 tensors, its metadata says 2147483647 layers"),
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
    monkeypatch.setattr("lorax_kit.extras.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"gguf is not installed.\n  install the extra: pip install 'lorax_kit\[llama\]'"
    ):
        load_llama(file)
