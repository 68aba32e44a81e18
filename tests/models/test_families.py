"""Folders of every family, as transformers saved them: what it computed, caches, heads, and the way back."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorax_kit as lk
from lorax_kit.models import Special, Tokenizer, answer, classify, fresh_head, load_llama, load_model, save_model
from lorax_kit.models.cache import Cache

FOLDER = Path(__file__).parents[1] / "fixtures" / "families"
FAMILIES = sorted(folder.name for folder in FOLDER.iterdir())


def copied(family, folder):
    """A family's folder, with a tokenizer."""
    shutil.copytree(FOLDER / family, folder)
    Tokenizer.from_merges(["a"], []).inner.save(str(folder / "tokenizer.json"))
    return folder


def recorded(family):
    """Inputs and outputs by torch's names."""
    return load_file(FOLDER / family / "recorded.safetensors")


def outputs(loaded, found):
    """What the model and its head give for the recorded inputs, by torch's names."""
    ids, mask = found["input_ids"], found["attention_mask"]
    params = {"params": loaded.params}
    if loaded.kind == "encoder-decoder":
        written = found["decoder_input_ids"], found["decoder_attention_mask"]
        return {"logits": loaded.model.apply(params, ids, mask, *written)}
    if loaded.kind == "decoder" and not loaded.heads:
        return {"logits": loaded.model.apply(params, ids, mask)}
    hidden = (
        loaded.model.apply(params, ids, mask, found.get("token_type_ids"))
        if loaded.kind == "encoder"
        else loaded.model.apply(params, ids, mask, hidden=True)
    )
    if "classify" in loaded.heads:
        return {"logits": classify(loaded.family, loaded.heads["classify"], hidden, mask)}
    start, end = answer(loaded.heads["answer"], hidden)
    return {"start_logits": start, "end_logits": end}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_computes_what_transformers_did_and_goes_back(tmp_path, family):
    loaded, found = load_model(copied(family, tmp_path / "x")), recorded(family)
    ours = jax.jit(lambda found: outputs(loaded, found))(found)
    per_text = "classify" in loaded.heads
    mask = found["decoder_attention_mask" if loaded.kind == "encoder-decoder" else "attention_mask"]
    for name, x in ours.items():
        counts = np.ones(len(x), bool) if per_text else mask == 1
        assert np.abs(found[name][counts]).max() > 0.5
        np.testing.assert_allclose(x[counts], found[name][counts], atol=1e-4, rtol=0, err_msg=name)
    save_model(tmp_path / "again", loaded)
    again = load_model(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    jax.tree.map(np.testing.assert_array_equal, again.heads, loaded.heads)
    assert (again.config, again.labels, again.special) == (loaded.config, loaded.labels, loaded.special)
    stored, written = (load_file(tmp_path / x / "model.safetensors") for x in ("x", "again"))
    assert set(written) == set(stored)
    for name, x in stored.items():
        np.testing.assert_array_equal(x.astype(np.float32), written[name], err_msg=name)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "marian"])
def test_quantised_as_it_loads_is_quantised_once_loaded_bit_for_bit(tmp_path, family):
    folder = copied(family, tmp_path / "x")
    ours = load_model(folder, quantise="nf4").params
    wanted = lk.quantize(load_model(folder).params, ["**/layer_*/**/kernel"], "nf4")
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    with pytest.raises(lk.PlanError, match="method 'nf5' is unknown; choose from int8, int4, nf4"):
        load_model(folder, quantise="nf5")


@pytest.mark.parametrize("family", ["gpt2", "llama3", "mistral_window", "qwen3", "gemma", "t5", "marian"])
def test_a_cache_gives_the_logits_of_the_full_pass(tmp_path, family):
    loaded, found = load_model(copied(family, tmp_path / "x")), recorded(family)
    sequence = loaded.kind == "encoder-decoder"
    prefix = "decoder_" if sequence else ""
    ids, mask = found[f"{prefix}input_ids"], found[f"{prefix}attention_mask"]

    def steps(params):
        """The first four tokens at once, then one at a time."""
        method = {"method": "decode"} if sequence else {}
        read = ()
        if sequence:
            theirs = found["input_ids"], found["attention_mask"]
            read = loaded.model.apply({"params": params}, *theirs, method="encode"), theirs[1]
        cache, out = loaded.model.empty_cache(len(ids), ids.shape[1] + 1), []
        for start, end in [(0, 4), (4, 5), (5, 6)]:
            part = ids[:, start:end], mask[:, start:end]
            logits, cache = loaded.model.apply({"params": params}, *part, *read, cache, **method)
            read = (None, None) if sequence else ()  # the cache has read it
            out.append(logits)
        return jnp.stack(out, 1), cache

    logits, cache = jax.jit(steps)(loaded.params)
    counts = mask[:, 3:6] == 1
    assert counts.sum() >= 6
    np.testing.assert_allclose(logits[counts], found["logits"][:, 3:6][counts], atol=1e-4, rtol=0)
    assert isinstance(cache, Cache)
    assert int(cache.end) == 6
    np.testing.assert_array_equal(cache.seen[:, :6], mask[:, :6] == 1)


@pytest.mark.parametrize("family", ["gpt2", "marian"])
def test_places_are_counted_from_the_mask_on_either_side(tmp_path, family):
    loaded = load_model(copied(family, tmp_path / "x"))
    words, blank = [[5, 9, 4, 7]], [[0, 0]]
    one, none = [[1, 1, 1, 1]], [[0, 0]]
    ways = [np.hstack([words, blank]), np.hstack([blank, words]), np.array(words)]
    masks = [np.hstack([one, none]), np.hstack([none, one]), np.array(one)]

    def run(ids, mask):
        inputs = (ids, mask) * (2 if loaded.kind == "encoder-decoder" else 1)
        return loaded.model.apply({"params": loaded.params}, *inputs)[mask[0][None] == 1]

    right, left, alone = (run(i.astype(np.int32), m.astype(np.int32)) for i, m in zip(ways, masks, strict=True))
    np.testing.assert_allclose(right, alone, atol=1e-5)
    np.testing.assert_allclose(left, alone, atol=1e-5)


def test_what_special_ids_and_windows_mean_when_they_are_absent_or_null(tmp_path):
    folder = copied("mistral", tmp_path / "x")
    assert load_model(folder).config.sliding_window is None
    config(sliding_window="absent", pad_token_id=-1, eos_token_id=[2, 7])(folder)
    loaded = load_model(folder)
    assert (loaded.config.sliding_window, loaded.special) == (4096, Special(bos=1, eos=(2, 7)))
    (folder / "generation_config.json").write_text('{"eos_token_id": 5, "pad_token_id": 0, "bos_token_id": null}')
    assert load_model(folder).special == Special(bos=1, eos=(5,), pad=0)


def test_t5s_head_is_divided_by_the_width_only_in_its_first_version(tmp_path):
    loaded = load_model(copied("t5", tmp_path / "x"))
    assert loaded.config.scale_decoder_outputs
    found = recorded("t5")
    inputs = [found[x] for x in ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")]
    model = loaded.model.clone(config=replace(loaded.config, scale_decoder_outputs=False))
    ratio = model.apply({"params": loaded.params}, *inputs) / loaded.model.apply({"params": loaded.params}, *inputs)
    np.testing.assert_allclose(ratio, 12**0.5, rtol=1e-4)


def test_sites_are_named_alike_and_run_factored(tmp_path):
    loaded = load_model(copied("t5", tmp_path / "x"))
    found = recorded("t5")
    inputs = [found[x] for x in ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")]

    def apply(params, *inputs):
        return loaded.model.apply({"params": params}, *inputs)

    spec = lk.Spec({"{en,de}coder/**/{query,value,up}/kernel": lk.LoRA(rank=2)})
    plan = lk.resolve(spec, loaded.params, apply, *inputs)
    assert len(plan.sites) == 3 + 2 * 5  # q, v and up of an encoder layer; of two decoder layers q and v twice, and up
    _, factors = lk.split(loaded.params, plan, jax.random.key(0))
    factors = {p: f._replace(b=jax.random.normal(jax.random.key(1), f.b.shape)) for p, f in factors.items()}
    ours = jax.jit(lk.adapt(apply, plan))(loaded.params, factors, *inputs)
    merged = jax.jit(apply)(lk.merge(loaded.params, factors, plan), *inputs)
    assert jnp.abs(ours - found["logits"]).max() > 0.1
    np.testing.assert_allclose(ours, merged, atol=1e-4)


def test_a_fresh_head_reads_the_mean_of_an_encoder_and_the_last_token_of_a_decoder():
    hidden = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0], [0, 1, 1, 1]])
    head = fresh_head(6, 3, jax.random.key(0))
    kernel = np.asarray(head["output"]["kernel"], np.float64)
    mean = np.stack([hidden[0, :3].mean(0), hidden[1, 1:].mean(0)])
    last = np.stack([hidden[0, 2], hidden[1, 3]])
    np.testing.assert_allclose(classify("bert", head, hidden, mask), mean @ kernel, atol=1e-6)
    np.testing.assert_allclose(classify("qwen2", head, hidden, mask), last @ kernel, atol=1e-6)
    first = np.stack([hidden[0, 0], hidden[1, 1]])
    dense = {"kernel": np.eye(6, dtype=np.float32), "bias": np.full(6, 0.5, np.float32)}
    deep = {"dense": dense, **head}
    np.testing.assert_allclose(classify("roberta", deep, hidden, mask), np.tanh(first + 0.5) @ kernel, atol=1e-6)
    np.testing.assert_allclose(
        classify("distilbert", deep, hidden, mask), np.maximum(first + 0.5, 0) @ kernel, atol=1e-6
    )


def test_what_is_stored_once_more_is_left_where_it_is_the_same(tmp_path):
    folder = copied("gpt2", tmp_path / "x")
    whole = load_model(folder)
    tensors = load_file(folder / "model.safetensors")
    more = {"lm_head.weight": tensors["transformer.wte.weight"], "transformer.h.0.attn.bias": np.ones((1, 1), bool)}
    save_file(tensors | more, folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_model(folder).params, whole.params)
    save_file(tensors | {"lm_head.weight": -more["lm_head.weight"]}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensors that this model does not use: 'lm_head\.weight'"):
        load_model(folder)


def config(**changes):
    def change(folder):
        data = json.loads((folder / "config.json").read_text()) | changes
        data = {key: value for key, value in data.items() if value != "absent"}
        (folder / "config.json").write_text(json.dumps(data))

    return change


def tensors(change):
    def damage(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return damage


def without(name):
    return tensors(lambda found: found.pop(name))


def extra(name):
    return tensors(lambda found: found.update({name: np.ones(3, np.float32)}))


BAD = [
    ("bert", config(model_type="bart"), "config.json has model_type 'bart'; known here are bert, distilbert, "),
    ("bert", without("bert.pooler.dense.bias"), "no tensor 'bert.pooler.dense.bias', which 'dense/bias' of its head"),
    ("bert", without("classifier.bias"), "no tensor 'classifier.bias', which 'output/bias' of its head needs"),
    ("bert", extra("bert.encoder.layer.0.adapter.weight"), "does not use: 'bert.encoder.layer.0.adapter.weight'"),
    ("bert", config(id2label={"0": "no", "1": "yes"}), "the head has 3 outputs, numbered from 0"),
    (
        "bert",
        config(architectures=["BertForTokenClassification"]),
        "has 'classifier.weight' of a BertForTokenClassification, a head that is not read",
    ),
    ("bert", config(eos_token_id="</s>"), "has eos_token_id '</s>'; it must be an id"),
    ("bert", config(eos_token_id=[3, 1000]), "says that its eos token has the id 1,000; the model has "),
    ("t5", config(decoder_start_token_id=999), "says that its start token has the id 999; the model has "),
    ("gpt2", config(pad_token_id=4000), "says that its pad token has the id 4,000; the model has "),
    ("roberta", without("classifier.dense.weight"), "no tensor 'classifier.dense.weight', which 'dense/kernel'"),
    ("distilbert", config(dim="absent"), "config.json lacks dim."),
    ("gpt2", config(n_embd="absent"), "config.json lacks n_embd, n_inner."),
    ("gpt2", config(n_embd=13, n_inner=16), "3 heads do not divide hidden_size 13"),
    ("gpt2", config(n_layer=True), "num_hidden_layers is True; it must be an integer of at least 1"),
    ("roberta", config(pad_token_id=15), "pad_token_id is 15, of 16 positions: places are counted from the one after"),
    ("bert", config(is_decoder=True), "is_decoder True; this model computes only False"),
    ("gemma", config(use_bidirectional_attention=True), "use_bidirectional_attention true; this decoder looks back"),
    ("llama3", config(vocab_size=2**31), "vocab_size is 2147483648; it must be below 2^31"),
    ("llama3", config(num_attention_heads=[6]), "num_attention_heads is [6]; it must be an integer of at least 1"),
    ("llama3", config(model_type=[]), "config.json has model_type []; known here are bert, "),
    ("gpt2", config(n_layer=3), "has no tensor 'transformer.h.2.ln_1.weight'"),
    ("gpt2", config(n_layer=1), "does not use: 'transformer.h.1.attn.c_attn.bias'"),
    ("gpt2", config(activation_function="mish"), "activation_function is 'mish'; known are gelu_new, "),
    ("gpt2", config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx True; this model computes"),
    ("gpt2", config(n_positions=17), "gives shape (16, 12) to 'embeddings/position/embedding', config.json says (17"),
    ("gpt2", extra("score.bias"), "does not use: 'score.bias'"),
    ("qwen2", config(use_sliding_window=True), "use_sliding_window"),
    ("qwen3", without("model.layers.1.self_attn.q_norm.weight"), "no tensor 'model.layers.1.self_attn.q_norm.weight'"),
    ("qwen3", without("lm_head.weight"), "no tensor 'lm_head.weight', which 'head/kernel' needs"),
    ("llama3", config(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "computes only unscaled positions"),
    ("t5", config(feed_forward_proj="gated-tanh"), "feed_forward_proj is 'gated-tanh'; known are relu, gated-gelu"),
    ("t5", config(feed_forward_proj="gated-gelu"), "does not use: 'decoder.block.0.layer.2.DenseReluDense.wi.weight'"),
    ("t5", config(num_decoder_layers=10**9), "tensors, config.json says 1000000001 layers"),
    ("t5", config(relative_attention_num_buckets=6), "6 buckets of relative positions up to 6: their number must be"),
    (
        "t5",
        config(d_kv=4),
        "gives shape (12, 15) to 'encoder/layer_0/attention/query/kernel', config.json says ",
    ),
    ("t5", extra("classification_head.dense.weight"), "does not use: 'classification_head.dense.weight'"),
    ("marian", config(normalize_before=True), "normalize_before True; this model computes only False"),
    ("marian", config(share_encoder_decoder_embeddings=False), "share_encoder_decoder_embeddings False"),
    ("marian", without("final_logits_bias"), "no tensor 'final_logits_bias'"),
    ("marian", config(d_model=15), "4 heads do not divide hidden_size 15"),
]


@pytest.mark.parametrize(("family", "damage", "says"), BAD)
def test_bad_folders_say(tmp_path, family, damage, says):
    folder = copied(family, tmp_path / "x")
    damage(folder)
    with pytest.raises(ValueError, match=re.escape(says)) as e:
        load_model(folder)
    assert len(str(e.value).splitlines()) <= 4


def test_a_missing_tokenizer_and_pickled_weights_name_the_next_step(tmp_path):
    folder = copied("marian", tmp_path / "x")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json; (.|\n)*source\.spm") as e:
        load_model(folder)
    assert len(str(e.value).splitlines()) <= 4
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors(.|\n)*pytorch_model\.bin is not read"):
        load_model(folder)


def test_a_decoder_of_another_kind_is_no_llama(tmp_path):
    with pytest.raises(ValueError, match="is of the family 'gpt2', and no decoder of LLaMA's kind"):
        load_llama(copied("gpt2", tmp_path / "x"))


@pytest.mark.parametrize("family", ["roberta", "gpt2", "gemma", "t5_gated", "marian"])
def test_bf16_is_close_and_plain_models_have_forward_derivatives(tmp_path, family, standard_promotion):
    loaded, found = load_model(copied(family, tmp_path / "x")), recorded(family)
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    inputs = [found[name] for name in names if name in found]
    mask = inputs[-1][..., None] != 0

    def mean(model):
        return lambda params: jnp.mean(jnp.where(mask, model.apply({"params": params}, *inputs), 0).astype(jnp.float32))

    def measures(params):
        model = loaded.model
        rounded = model.clone(dtype=jnp.bfloat16).apply({"params": params}, *inputs)
        slope = jax.grad(mean(model))(params)
        forward = jax.jvp(mean(model.clone(plain=True)), (params,), (slope,))[1]
        return model.apply({"params": params}, *inputs), rounded, jax.tree.map(jnp.vdot, slope, slope), forward

    whole, rounded, squares, forward = jax.jit(measures)(loaded.params)
    assert rounded.dtype == (jnp.bfloat16 if loaded.kind == "encoder" else jnp.float32)
    scale = jnp.abs(whole).max()
    counts = mask[..., 0]
    np.testing.assert_allclose(rounded[counts].astype(np.float32), whole[counts], atol=float(0.08 * scale), rtol=0)
    np.testing.assert_allclose(forward, sum(jax.tree.leaves(squares)), rtol=1e-4)
    assert all(x > 0 for x in jax.tree.leaves(squares)[::5])
