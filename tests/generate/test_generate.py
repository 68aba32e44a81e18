"""Writing: against the whole pass, against formulas in float64, against exhaustive search."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import lorax_kit as lk
from lorax_kit.errors import LoraxError
from lorax_kit.generate import Sampling, Writer, adapted, beam_search, decoder_of, per_row_decoder
from lorax_kit.generate.pieces import Pieces
from lorax_kit.generate.sampling import chosen, left, penalised
from lorax_kit.models import LlamaConfig, LlamaModel, Loaded, Special, Tokenizer
from tests.traces import Traced

pytestmark = pytest.mark.usefixtures("standard_promotion")

EOS = 5
CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=96,
)  # fmt: skip


def byte_tokenizer():
    """A token for each byte, and 44 more that no text has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: i for i, letter in enumerate([*(f"<{i}>" for i in range(6)), *alphabet])}
    ids |= {f"<{i}>": i for i in range(len(ids), 300)}
    inner = tokenizers.Tokenizer(models.BPE(ids, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return Tokenizer(inner)


@pytest.fixture(scope="module")
def loaded():
    model = LlamaModel(CONFIG)
    ids = jnp.zeros((1, 2), jnp.int32)
    params = jax.tree.map(lambda x: 2 * x, model.init(jax.random.key(0), ids, ids)["params"])
    return Loaded(
        family="llama", kind="decoder", config=CONFIG, model=model, params=params, heads={}, labels=None,
        tokenizer=byte_tokenizer(), special=Special(eos=(EOS,)), chat_template=None, source="tiny", folder=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def writer(loaded):
    return Writer(decoder_of(loaded), loaded.tokenizer)


@jax.jit
def whole_pass(params, ids, mask):
    return LlamaModel(CONFIG).apply({"params": params}, ids, mask)


def logits_of(loaded, ids, params=None):
    """Of the token after a text, by one pass over it, float64; padding stands on the right."""
    padded = np.zeros((1, 96), np.int32)
    padded[0, : len(ids)] = ids
    out = whole_pass(params or loaded.params, padded, np.arange(96)[None] < len(ids))
    return np.asarray(out, np.float64)[0, len(ids) - 1]


def log_softmax(x):
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def greedy(loaded, ids, new, params=None):
    out = []
    for _ in range(new):
        out.append(int(logits_of(loaded, [*ids, *out], params).argmax()))
        if out[-1] == EOS:
            break
    return out


PROMPTS = ["Hello", "a", "The quick brown fox jumps over it"]


def test_greedy_equals_the_whole_pass_for_prompts_of_any_length(loaded, writer):
    found = writer(loaded.params, PROMPTS, max_new_tokens=12)
    for prompt, one in zip(PROMPTS, found, strict=True):
        ids = loaded.tokenizer.encode([prompt], 99)[0]
        assert list(one.tokens) == greedy(loaded, ids, 12)
        logp = [log_softmax(logits_of(loaded, [*ids, *one.tokens[:i]]))[t] for i, t in enumerate(one.tokens)]
        np.testing.assert_allclose(one.logprobs, logp, atol=1e-4)
        assert one.prompt == len(ids)
        assert one.finished == ("eos" if one.tokens[-1] == EOS else "length")


def test_a_rows_text_does_not_depend_on_the_batch(loaded, writer):
    warm = Sampling(temperature=1.0, top_p=0.9)
    together = writer(loaded.params, PROMPTS, max_new_tokens=10, sampling=warm, samples=2, seed=3)
    assert len({one.tokens for one in together}) > 4
    for i, prompt in enumerate(PROMPTS):
        alone = writer(loaded.params, [prompt], max_new_tokens=10, sampling=warm, samples=2, seed=3)
        assert [one.tokens for one in alone] == [one.tokens for one in together[2 * i : 2 * i + 2]]
        np.testing.assert_allclose(alone[0].logprobs, together[2 * i].logprobs, atol=1e-5)
    other = writer(loaded.params, PROMPTS, max_new_tokens=10, sampling=warm, samples=2, seed=4)
    assert [one.tokens for one in other] != [one.tokens for one in together]


def test_what_sampling_leaves_is_what_its_words_say():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 40)) * 3
    for top_k, top_p, min_p in [(5, 1.0, 0.0), (None, 0.6, 0.0), (None, 1.0, 0.1), (8, 0.8, 0.05), (1, 1.0, 0.0)]:
        settings = Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
        ours = np.asarray(left(jnp.asarray(logits, jnp.float32), settings.scalars()))
        for row, out in zip(logits, ours, strict=True):
            order = np.argsort(-row)
            kept = order[: top_k or 40]
            p = np.exp(row[kept]) / np.exp(row[kept]).sum()
            kept = kept[: int(np.searchsorted(np.cumsum(p), top_p)) + 1]
            share = np.exp(row[kept] - row[kept].max())
            assert sorted(kept[share >= min_p]) == np.flatnonzero(np.isfinite(out)).tolist()


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]], jnp.float32)).repeat(4000, axis=0)
    settings = Sampling(temperature=0.5)
    keys = jax.random.split(jax.random.key(0), 4000)
    token, logp = chosen(logits, settings.scalars(), keys, None, settings.form)
    p = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(np.bincount(token, minlength=4) / 4000, p / p.sum(), atol=0.03)
    np.testing.assert_allclose(logp, np.log([0.5, 0.3, 0.15, 0.05])[np.asarray(token)], rtol=1e-5)


def test_the_penalty_makes_used_tokens_less_likely(loaded, writer):
    logits, used = jnp.asarray([[2.0, -2.0, 1.0]]), jnp.asarray([[True, True, False]])
    assert penalised(logits, used, jnp.float32(2.0)).tolist() == [[1.0, -4.0, 1.0]]
    found = writer(loaded.params, ["Hello"], max_new_tokens=12, sampling=Sampling(repetition_penalty=1e6))[0]
    tokens = [*loaded.tokenizer.encode(["Hello"], 99)[0], *found.tokens]
    assert len(set(tokens)) == len(tokens) - 1  # "l" stands twice in the prompt


def test_beams_find_the_best_of_all_texts(loaded):
    small = Writer(decoder_of(loaded), loaded.tokenizer)
    ids = [70, 71]
    every = []
    first = log_softmax(logits_of(loaded, ids))
    for one in [x for x in np.argsort(-first)[:40].tolist() if x != EOS]:
        second = log_softmax(logits_of(loaded, [*ids, one]))
        every += [((first[one] + second[two]) / 2, (one, two)) for two in range(300)]
    every.append((first[EOS], (EOS,)))
    found = beam_search(small, loaded.params, [ids], beams=40, max_new_tokens=2)[0]
    assert found.tokens == max(every)[1]
    assert found.logprob / len(found.tokens) == pytest.approx(max(every)[0], abs=1e-4)
    one = beam_search(small, loaded.params, PROMPTS, beams=1, max_new_tokens=8)
    assert [x.tokens for x in one] == [x.tokens for x in small(loaded.params, PROMPTS, max_new_tokens=8)]


def test_a_text_ends_before_a_stop_string_and_streams_in_whole_characters(loaded, writer):
    plain = writer(loaded.params, ["Hello"], max_new_tokens=12)[0]
    assert len(plain.text) > 6
    stop = plain.text[3:5]
    cut = writer(loaded.params, ["Hello"], max_new_tokens=12, stop=[stop])[0]
    assert cut.text == plain.text[: plain.text.find(stop)]
    assert cut.finished == "stop"
    pieces = list(writer.stream(loaded.params, "Hello", max_new_tokens=12, stop=[stop]))
    assert "".join(pieces) == cut.text
    text, tokens = Pieces(loaded.tokenizer, ("END",)), loaded.tokenizer.encode(["aäENEND!"], 99)[0]
    shown = []
    for token in tokens:
        text.add(token, 0.0, ())
        shown.append(text.piece())
        if text.finished:
            break
    assert shown == ["a", "", "ä", "", "", "EN", "", ""]
    assert (text.finished, text.whole(), text.rest()) == ("stop", "aäEN", "")


def sentencepiece_tokenizer():
    """As LLaMA's: spaces within pieces, and bytes."""
    space = "\u2581"
    pieces = [space + "a", "b", *(f"<0x{byte:02X}>" for byte in (0xC3, 0xA9, 0x97))]
    inner = tokenizers.Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="b"))
    steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return Tokenizer(inner)


@pytest.mark.parametrize(
    ("before", "ids", "wanted"),
    [((0, 1), [0, 1], " ab"), ((0, 1), [1, 0], "b a"), ((), [0, 1], "ab"), ((2,), [3, 0], "\ufffd a")],
)
def test_a_text_that_goes_on_keeps_its_first_space(before, ids, wanted):
    text = Pieces(sentencepiece_tokenizer(), before=before)
    shown = ""
    for token in ids:
        text.add(token, 0.0, ())
        shown += text.piece()
    assert shown + text.rest() == text.whole() == wanted


def test_bytes_that_are_no_character_stream_as_they_are_decoded():
    for ids, wanted in (([0, 2, 3, 0, 1], "aé ab"), ([2, 3, 4, 1], "\ufffd\ufffd\ufffdb"), ([0, 2], "a\ufffd")):
        text = Pieces(sentencepiece_tokenizer())
        shown = ""
        for token in ids:
            text.add(token, 0.0, ())
            shown += text.piece()
        assert shown + text.rest() == text.whole() == wanted


def adapters(loaded, count, ranks=(2,)):
    ids = jnp.zeros((1, 4), jnp.int32)

    def fn(params, ids, mask):
        return loaded.model.apply({"params": params}, ids, mask)

    for i in range(count):
        spec = lk.Spec({"layer_*/**/kernel": lk.LoRA(rank=ranks[i % len(ranks)], alpha=8)})
        plan = lk.resolve(spec, loaded.params, fn, ids, ids)
        _, factors = lk.split(loaded.params, plan, jax.random.key(i))
        drawn = jax.tree.map(lambda x, i=i: jax.random.normal(jax.random.key(i), x.shape, x.dtype) / 6, factors)
        yield plan, drawn


def traced(decoder):
    return replace(decoder, begin=Traced(decoder.begin), step=Traced(decoder.step))


def traces(decoder):
    return decoder.begin.traces, decoder.step.traces


def test_factored_adapters_are_swapped_without_a_new_program(loaded):
    (plan, one), (_, two) = adapters(loaded, 2)
    decoder = traced(decoder_of(loaded))
    writer, first = Writer(adapted(decoder, plan), loaded.tokenizer), None
    for factors in (one, two):
        base, _ = lk.split(loaded.params, plan, jax.random.key(0))
        merged = lk.merge(base, factors, plan)
        found = writer((base, factors), ["Hello", "a"], max_new_tokens=8)
        whole = Writer(decoder_of(loaded), loaded.tokenizer)(merged, ["Hello", "a"], max_new_tokens=8)
        assert [x.tokens for x in found] == [x.tokens for x in whole]
        np.testing.assert_allclose(found[0].logprobs, whole[0].logprobs, atol=1e-4)
        first = first or traces(decoder)
    assert traces(decoder) == first


def test_each_row_writes_with_its_own_adapter(loaded):
    some = [lk.algebra.Adaptation(plan, factors) for plan, factors in adapters(loaded, 3, ranks=(1, 3))]
    stacked = lk.algebra.stack([None, *some], base=loaded.params)
    decoder = traced(decoder_of(loaded))
    writer = Writer(per_row_decoder(decoder, stacked), loaded.tokenizer)
    with pytest.raises(LoraxError, match="params hold an adapter for each row of the prompts alone"):
        beam_search(writer, (loaded.params, lk.algebra.rows_of(stacked, [0, 1, 2])), PROMPTS, beams=2)
    which = jnp.asarray([2, 0, 3])
    found = writer((loaded.params, lk.algebra.rows_of(stacked, which)), PROMPTS, max_new_tokens=8)
    first = traces(decoder)
    plain = Writer(decoder_of(loaded), loaded.tokenizer)
    for prompt, one, index in zip(PROMPTS, found, which, strict=True):
        own = some[int(index) - 1] if index else None
        params = loaded.params if own is None else lk.merge(loaded.params, own.factors, own.plan)
        solo = plain(params, [prompt], max_new_tokens=8)[0]
        assert one.tokens == solo.tokens
        # Of the merged weights: logits of size 10 are rounded at another place.
        np.testing.assert_allclose(one.logprobs, solo.logprobs, rtol=1e-5, atol=1e-5)
    writer((loaded.params, lk.algebra.rows_of(stacked, [0, 1, 2])), PROMPTS, max_new_tokens=8)
    assert traces(decoder) == first


BAD = [
    ({"prompts": []}, "prompts must be a list of texts"),
    ({"prompts": "Hello"}, "prompts must be a list of texts"),
    ({"prompts": [""]}, "prompt 0 is empty"),
    ({"prompts": ["a" * 90], "max_new_tokens": 7}, "prompt 0 has 90 tokens, and 7 are to be written: the model has 96"),
    ({"prompts": [3]}, "prompt 0 is 3; it must be a text, or a list of token ids"),
    ({"prompts": ["a", [7, 300]]}, "prompt 1 holds 300; the id of a token is an integer from 0 below the model's 300"),
    ({"prompts": [[-1]]}, "prompt 0 holds -1"),
    ({"prompts": [[1.7]]}, "prompt 0 holds 1.7"),
    ({"prompts": [[True]]}, "prompt 0 holds True"),
    ({"prompts": [np.array([[1, 2]])]}, "prompt 0 holds array([1, 2])"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be an integer of at least 1"),
    ({"samples": 1.5}, "samples is 1.5"),
    ({"stop": "x"}, "stop is 'x'; it must be a list of strings"),
    ({"stop": [""]}, "none of them empty"),
]


@pytest.mark.parametrize(("changes", "says"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_written_is_said(loaded, writer, changes, says):
    with pytest.raises(LoraxError) as error:
        writer(loaded.params, **{"prompts": ["a"], **changes})
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": -1}, "temperature is -1; it must be a number of at least 0"),
        ({"top_k": 5}, "leave the most likely token alone, which temperature 0 takes"),
        ({"temperature": 1, "top_p": 0}, "top_p is 0; it must be a number above 0"),
        ({"temperature": 1, "top_k": 0}, "top_k is 0; it must be an integer of at least 1, or None"),
        ({"heat": 1}, "it must be an object of temperature, top_k"),
    ],
)
def test_sampling_says_what_is_out_of_range(settings, says):
    with pytest.raises(LoraxError) as error:
        Sampling.from_dict(settings)
    assert says in str(error.value)
    assert Sampling.from_dict(Sampling(temperature=0.5).to_dict()) == Sampling(temperature=0.5)


def test_ids_of_any_array_are_the_text_they_stand_for(loaded, writer):
    ids = loaded.tokenizer.encode(["Hello"], 9)[0]
    (wanted,) = writer(loaded.params, ["Hello"], max_new_tokens=4)
    for given in (ids, np.array(ids), jnp.array(ids), [np.int64(i) for i in ids]):
        assert writer(loaded.params, [given], max_new_tokens=4) == [wanted]


def test_the_longest_text_fits(loaded, writer):
    found = writer(loaded.params, ["a" * 90, "b"], max_new_tokens=6)
    for prompt, one in zip(["a" * 90, "b"], found, strict=True):
        assert list(one.tokens) == greedy(loaded, loaded.tokenizer.encode([prompt], 99)[0], 6)
