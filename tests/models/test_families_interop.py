"""Every family equals transformers: random weights saved by it load here, compute the same, and go back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_kit.models import (
    MissingPackageError,
    Tokenizer,
    answer,
    classify,
    load_model,
    save_model,
)

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.fixtures import torch_families as tiny  # noqa: E402  (imports torch)
from tests.fixtures.torch_families import DECODERS, ENCODERS, SEQUENCES, TOKENS, inputs_of, theirs  # noqa: E402
from tests.traces import Traced  # noqa: E402


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


def assert_close(ours, expected, mask, atol=1e-4):
    expected = expected.numpy()
    assert np.abs(expected[mask == 1]).max() > 0.5
    np.testing.assert_allclose(np.asarray(ours)[mask == 1], expected[mask == 1], atol=atol, rtol=0)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_and_its_trained_heads(tmp_path, kind):
    inputs = inputs_of(kind)
    ids, mask, *types = inputs.values()
    whole = tiny.encoder(kind, "ForSequenceClassification")
    loaded = saved(whole, tmp_path / "classify")
    assert (loaded.family, loaded.kind, loaded.labels) == (kind, "encoder", ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert_back(loaded, whole, tmp_path / "classify again")
    run = jax.jit(loaded.model.apply)
    hidden = run({"params": loaded.params}, ids, mask, *types)
    assert_close(hidden, theirs(whole.base_model, **inputs).last_hidden_state, mask)
    logits = classify(loaded.family, loaded.heads["classify"], hidden, mask)
    assert_close(logits, theirs(whole, **inputs).logits, np.ones(3))

    whole = tiny.encoder(kind, "ForQuestionAnswering")
    loaded = saved(whole, tmp_path / "answer")
    assert set(loaded.heads) == {"answer"}
    assert_back(loaded, whole, tmp_path / "answer again")
    hidden = run({"params": loaded.params}, ids, mask, *types)
    expected = theirs(whole, **inputs)
    for found, logits in zip(answer(loaded.heads["answer"], hidden), expected[:2], strict=True):
        assert_close(found, logits, mask)

    alone = saved(whole.base_model, tmp_path / "alone")
    assert (alone.heads, alone.labels) == ({}, None)
    jax.tree.map(np.testing.assert_array_equal, alone.params, loaded.params)
    masked = tiny.encoder(kind, "ForMaskedLM")
    loaded = saved(masked, tmp_path / "masked")
    hidden = run({"params": loaded.params}, ids, mask, *types)
    assert_close(hidden, theirs(masked.base_model, **inputs).last_hidden_state, mask)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_its_cache_and_its_trained_head(tmp_path, kind):
    whole = tiny.decoder(kind)
    loaded = saved(whole, tmp_path / "words", max_shard_size="5KB")
    assert len(list((tmp_path / "words").glob("model-*.safetensors"))) > 1
    assert (loaded.kind, loaded.special.eos, loaded.special.pad, loaded.positions) == ("decoder", (2,), 0, 16)
    assert_back(loaded, whole, tmp_path / "words again")
    inputs = inputs_of(kind)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    run = jax.jit(loaded.model.apply)
    logits = run({"params": loaded.params}, ids, mask)
    assert_close(logits, theirs(whole, **inputs).logits, mask)

    found, cache = run({"params": loaded.params}, ids[:, :6], mask[:, :6], loaded.model.empty_cache(3, TOKENS + 2))
    for t in range(5, TOKENS):
        if t > 5:
            found, cache = run({"params": loaded.params}, ids[:, t : t + 1], mask[:, t : t + 1], cache)
        np.testing.assert_allclose(found[mask[:, t] == 1], logits[mask[:, t] == 1, t], atol=2e-5)

    judge = tiny.decoder(kind, "ForSequenceClassification")
    loaded = saved(judge, tmp_path / "classify")
    assert_back(loaded, judge, tmp_path / "classify again")
    hidden = jax.jit(lambda p, *x: loaded.model.apply({"params": p}, *x, hidden=True))(loaded.params, ids, mask)
    logits = classify(loaded.family, loaded.heads["classify"], hidden, mask)
    assert_close(logits, theirs(judge, **inputs).logits, np.ones(3))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "qwen3"])
def test_a_decoder_that_answers(tmp_path, kind):
    whole = tiny.decoder(kind, "ForQuestionAnswering")
    loaded = saved(whole, tmp_path / "answer")
    assert_back(loaded, whole, tmp_path / "again")
    inputs = inputs_of(kind)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    hidden = loaded.model.apply({"params": loaded.params}, ids, mask, hidden=True)
    for found, logits in zip(answer(loaded.heads["answer"], hidden), theirs(whole, **inputs)[:2], strict=True):
        assert_close(found, logits, mask)


@pytest.mark.parametrize("kind", SEQUENCES)
def test_an_encoder_decoder_and_its_cache(tmp_path, kind):
    whole = tiny.sequence(kind)
    loaded = saved(whole, tmp_path / "model")
    assert (loaded.kind, loaded.special.start) == ("encoder-decoder", SEQUENCES[kind][2]["decoder_start_token_id"])
    assert ("head" in loaded.params) == (kind == "t5_gated")
    assert_back(loaded, whole, tmp_path / "again")
    inputs = inputs_of(kind)
    ids, mask, written, written_mask = inputs.values()
    logits = jax.jit(loaded.model.apply)({"params": loaded.params}, *inputs.values())
    assert_close(logits, theirs(whole, **inputs).logits, written_mask)

    def decode(params, *inputs):
        return loaded.model.apply({"params": params}, *inputs, method="decode")

    hidden = loaded.model.apply({"params": loaded.params}, ids, mask, method="encode")
    cache = loaded.model.empty_cache(3, 12)
    found, cache = jax.jit(decode)(loaded.params, written[:, :4], written_mask[:, :4], hidden, mask, cache)
    traced = Traced(lambda params, ids, mask, cache: decode(params, ids, mask, None, None, cache))
    step = jax.jit(traced)
    for t in range(3, written.shape[1]):
        if t > 3:
            found, cache = step(loaded.params, written[:, t : t + 1], written_mask[:, t : t + 1], cache)
        counts = written_mask[:, t] == 1
        np.testing.assert_allclose(found[counts], logits[counts, t], atol=2e-6 * jnp.abs(logits).max() + 1e-5)
    assert traced.traces == 1


def test_gpt2_as_its_authors_saved_it_without_a_prefix_and_with_its_masks(tmp_path):
    whole = tiny.decoder("gpt2")
    loaded = saved(whole.transformer, tmp_path / "bare")
    inputs = inputs_of("gpt2")
    logits = loaded.model.apply({"params": loaded.params}, inputs["input_ids"], inputs["attention_mask"])
    assert_close(logits, theirs(whole, **inputs).logits, inputs["attention_mask"])


@pytest.mark.parametrize(("source", "make"), [("minilm", "BertModel"), ("smollm2", "LlamaForCausalLM")])
def test_the_real_models_saved_here_are_those_of_transformers(tmp_path, source, make):
    try:
        loaded = load_model(source)
    except (MissingPackageError, ImportError) as e:
        pytest.skip(str(e))
    save_model(tmp_path / "x", loaded)
    settings = {"add_pooling_layer": False} if make == "BertModel" else {}
    model = getattr(transformers, make).from_pretrained(tmp_path / "x", **settings).eval()
    rows = loaded.tokenizer.encode(["The capital of France is", "A quietly moving film, and longer."], 16)
    ids, mask = np.zeros((2, 16), np.int32), np.zeros((2, 16), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    ours = jax.jit(loaded.model.apply)({"params": loaded.params}, ids, mask)
    expected = theirs(model, input_ids=ids, attention_mask=mask)[0]
    assert_close(ours, expected, mask, atol=1e-4 * max(1.0, float(expected.abs().max())))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    assert tokenizer("The capital of France is")["input_ids"] == rows[0]
    assert load_model(tmp_path / "x").config == loaded.config
