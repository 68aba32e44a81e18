"""Every family equals transformers: random weights saved by it load here, compute the same, and go back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_kit.models import Tokenizer, answer, classify, load_model, save_model

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, TOKENS = 40, 14
FIXED = ("embed_positions", "inv_freq", "embed_scale")  # constants that torch holds as tensors
ENCODER = {
    **{"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3},
    **{"intermediate_size": 30, "max_position_embeddings": 32, "num_labels": 3},
}
DECODER = {
    **{"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6},
    **{"num_key_value_heads": 2, "intermediate_size": 30, "max_position_embeddings": 32, "rms_norm_eps": 1e-5},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3},
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
GPT2 = {
    **{"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32, "num_labels": 3},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
T5 = {
    **{"vocab_size": VOCAB, "d_model": 24, "d_kv": 5, "d_ff": 30, "num_layers": 2, "num_decoder_layers": 3},
    **{"num_heads": 3, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12},
    **{"decoder_start_token_id": 0},
}
MARIAN = {
    **{"vocab_size": VOCAB, "d_model": 24, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 3},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 30, "decoder_ffn_dim": 20, "max_position_embeddings": 32},
    **{"pad_token_id": 39, "decoder_start_token_id": 39, "eos_token_id": 0, "forced_eos_token_id": 0},
    **{"bos_token_id": None, "activation_function": "swish", "scale_embedding": True},
}
ENCODERS = {
    "Bert": {**ENCODER, "type_vocab_size": 2},
    "Roberta": {**ENCODER, "type_vocab_size": 1, "pad_token_id": 1},
    "XLMRoberta": {**ENCODER, "type_vocab_size": 1, "pad_token_id": 1},
    "DistilBert": {
        **{"vocab_size": VOCAB, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 30, "num_labels": 3},
        "max_position_embeddings": 32,
    },
}
DECODERS = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral with a window": ("Mistral", {"sliding_window": 4, "attn_implementation": "eager"}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 10}),
    "gemma": ("Gemma", {"head_dim": 8, "num_key_value_heads": 1}),
}


def drawn(make, config):
    """A model whose every weight is drawn, norms and biases, too."""
    torch.manual_seed(0)
    model = make(config)
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if x.is_floating_point() and not any(fixed in name for fixed in FIXED):
                x.add_(0.2 * torch.randn_like(x))
    return model.eval()


def saved(model, folder, **settings):
    model.save_pretrained(folder, **settings)
    Tokenizer.from_merges(["a"], []).inner.save(str(folder / "tokenizer.json"))
    return load_model(folder)


def assert_back(loaded, whole, folder):
    """What is saved here is what transformers saved: the same class with the same weights, none missing, none left."""
    save_model(folder, loaded)
    again, report = type(whole).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    expected = whole.state_dict()
    for name, x in again.state_dict().items():
        assert torch.equal(x, expected[name]), name


def texts(left=True):
    """Three rows of words, one padded on the right, one on the left."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCAB - 1, (3, TOKENS)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, 9:] = 0
    if left:
        mask[2, :5] = 0
    return ids, mask


def theirs(model, *inputs, **named):
    def tensor(x):
        return torch.tensor(x, dtype=torch.long)

    with torch.no_grad():
        return model(*map(tensor, inputs), **{key: tensor(x) for key, x in named.items()})


def assert_close(ours, expected, mask, atol=1e-4):
    expected = expected.numpy()
    assert np.abs(expected[mask == 1]).max() > 0.5
    np.testing.assert_allclose(np.asarray(ours)[mask == 1], expected[mask == 1], atol=atol, rtol=0)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_and_its_trained_heads(tmp_path, name):
    config = getattr(transformers, f"{name}Config")(**ENCODERS[name])
    ids, mask = texts(left=False)
    ids[mask == 0] = 1  # RoBERTa takes places from the ids, where ours takes them from the mask
    types = {"token_type_ids": ((np.arange(TOKENS)[None] > 6) * mask).astype(np.int32)} if name == "Bert" else {}
    whole = drawn(getattr(transformers, f"{name}ForSequenceClassification"), config)
    loaded = saved(whole, tmp_path / "classify")
    assert (loaded.kind, loaded.labels) == ("encoder", ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert_back(loaded, whole, tmp_path / "classify again")
    run = jax.jit(loaded.model.apply)
    hidden = run({"params": loaded.params}, ids, mask, *types.values())
    assert_close(hidden, theirs(whole.base_model, ids, mask, **types).last_hidden_state, mask)
    logits = classify(loaded.family, loaded.heads["classify"], hidden, mask)
    assert_close(logits, theirs(whole, ids, mask, **types).logits, np.ones(3))

    config.num_labels = 2
    whole = drawn(getattr(transformers, f"{name}ForQuestionAnswering"), config)
    loaded = saved(whole, tmp_path / "answer")
    hidden = run({"params": loaded.params}, ids, mask, *types.values())
    assert_back(loaded, whole, tmp_path / "answer again")
    expected = theirs(whole, ids, mask, **types)
    for found, logits in zip(answer(loaded.heads["answer"], hidden), expected[:2], strict=True):
        assert_close(found, logits, mask)
    assert "classify" not in loaded.heads

    alone = saved(whole.base_model, tmp_path / "alone")
    assert (alone.heads, alone.labels) == ({}, None)
    jax.tree.map(np.testing.assert_array_equal, alone.params, loaded.params)
    masked = drawn(getattr(transformers, f"{name}ForMaskedLM"), config)
    expected = theirs(masked.base_model, ids, mask, **types).last_hidden_state
    loaded = saved(masked, tmp_path / "masked")
    assert_close(run({"params": loaded.params}, ids, mask, *types.values()), expected, mask)


def decoder(kind):
    if kind == "gpt2":
        return "GPT2", GPT2
    name, settings = DECODERS[kind]
    return name, {**DECODER, **settings}


def places_of(mask):
    return np.maximum(np.cumsum(mask, 1) - 1, 0)


@pytest.mark.parametrize("kind", ["gpt2", *DECODERS])
def test_a_decoder_its_cache_and_its_trained_head(tmp_path, kind):
    name, settings = decoder(kind)
    config = getattr(transformers, f"{name}Config")(**settings)
    make = getattr(transformers, "GPT2LMHeadModel" if kind == "gpt2" else f"{name}ForCausalLM")
    whole = drawn(make, config)
    loaded = saved(whole, tmp_path / "words", max_shard_size="20KB")
    assert len(list((tmp_path / "words").glob("model-*.safetensors"))) > 1
    assert (loaded.kind, loaded.special.eos, loaded.special.pad, loaded.positions) == ("decoder", (2,), 0, 32)
    assert_back(loaded, whole, tmp_path / "words again")
    ids, mask = texts()
    named = {"position_ids": places_of(mask)} if kind == "gpt2" else {}
    expected = theirs(whole, input_ids=ids, attention_mask=mask, **named).logits
    run = jax.jit(loaded.model.apply)
    logits = run({"params": loaded.params}, ids, mask)
    assert_close(logits, expected, mask)

    found, cache = run({"params": loaded.params}, ids[:, :6], mask[:, :6], loaded.model.empty_cache(3, TOKENS + 2))
    for t in range(5, TOKENS):
        if t > 5:
            found, cache = run({"params": loaded.params}, ids[:, t : t + 1], mask[:, t : t + 1], cache)
        np.testing.assert_allclose(found[mask[:, t] == 1], logits[mask[:, t] == 1, t], atol=2e-5)

    config.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
    judge = drawn(getattr(transformers, f"{name}ForSequenceClassification"), config)
    ids = np.where(mask == 0, 0, ids)  # transformers finds the last token by the id of padding
    loaded = saved(judge, tmp_path / "classify")
    assert_back(loaded, judge, tmp_path / "classify again")
    hidden = jax.jit(lambda p, *x: loaded.model.apply({"params": p}, *x, hidden=True))(loaded.params, ids, mask)
    expected = theirs(judge, input_ids=ids, attention_mask=mask, **named).logits
    assert_close(classify(loaded.family, loaded.heads["classify"], hidden, mask), expected, np.ones(3))


SEQUENCES = {
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5 1.1": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
    "marian": ("MarianMTModel", "MarianConfig", MARIAN),
}


@pytest.mark.parametrize("kind", SEQUENCES)
def test_an_encoder_decoder_and_its_cache(tmp_path, kind):
    make, config, settings = SEQUENCES[kind]
    if kind == "t5 1.1":
        settings = {**settings, "tie_word_embeddings": False}
    whole = drawn(getattr(transformers, make), getattr(transformers, config)(**settings))
    if kind == "t5 1.1":
        whole.lm_head.weight = torch.nn.Parameter(torch.randn_like(whole.lm_head.weight))
    loaded = saved(whole, tmp_path)
    assert loaded.kind == "encoder-decoder"
    assert_back(loaded, whole, tmp_path / "again")
    assert loaded.special.start == settings["decoder_start_token_id"]
    assert ("head" in loaded.params) == (kind == "t5 1.1")
    ids, mask = texts(left=kind != "marian")  # Marian's positions are counted from the mask here
    written, written_mask = texts(left=kind != "marian")
    written, written_mask = written[::-1, :9].copy(), written_mask[::-1, :9].copy()
    expected = theirs(
        whole, input_ids=ids, attention_mask=mask, decoder_input_ids=written, decoder_attention_mask=written_mask
    ).logits
    logits = jax.jit(loaded.model.apply)({"params": loaded.params}, ids, mask, written, written_mask)
    assert_close(logits, expected, written_mask)

    def decode(params, *inputs):
        return loaded.model.apply({"params": params}, *inputs, method="decode")

    hidden = loaded.model.apply({"params": loaded.params}, ids, mask, method="encode")
    cache = loaded.model.empty_cache(3, 12)
    found, cache = jax.jit(decode)(loaded.params, written[:, :4], written_mask[:, :4], hidden, mask, cache)
    step = jax.jit(lambda params, ids, mask, cache: decode(params, ids, mask, None, None, cache))
    for t in range(3, 9):
        if t > 3:
            found, cache = step(loaded.params, written[:, t : t + 1], written_mask[:, t : t + 1], cache)
        counts = written_mask[:, t] == 1
        np.testing.assert_allclose(found[counts], logits[counts, t], atol=2e-5 * jnp.abs(logits).max())
    assert step._cache_size() == 1
