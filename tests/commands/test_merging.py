"""`lorax-kit merge`: what of a model folder the merged folder has, and under which names."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import lorax_kit as lk
from lorax_kit.cli import cli
from lorax_kit.core.paths import flatten
from lorax_kit.models import classifier_names, classifier_params, load_bert, load_llama, torch_names
from tests.draws import moved
from tests.models import llama_files as tiny
from tests.models.test_pretrained import write_folder
from tests.models.test_pretrained_llama import split_in_two

QUERY = "layer_*/attention/query/kernel"
HEADS = {
    "classifier": {"bert.pooler.dense.weight": (6, 6), "classifier.weight": (3, 6), "classifier.bias": (3,)},
    "words": {"cls.predictions.bias": (11,), "cls.predictions.decoder.weight": (11, 6)},
    "pooler": {"pooler.dense.weight": (6, 6), "pooler.dense.bias": (6,)},
}


def model_of(folder, head, dtype=np.float32):
    """A BERT folder with tensors beside its encoder, and a count that is no float."""
    write_folder(folder, "" if head == "pooler" else "bert.")
    tensors = {name: x.astype(dtype) for name, x in load_file(folder / "model.safetensors").items()}
    rng = np.random.default_rng(1)
    tensors |= {name: rng.normal(size=shape).astype(dtype) for name, shape in HEADS[head].items()}
    tensors["embeddings.position_ids" if head == "pooler" else "bert.embeddings.position_ids"] = np.arange(5)[None]
    save_file(tensors, folder / "model.safetensors")
    return tensors


def trained(params, rules):
    plan = lk.resolve(lk.Spec(rules), params)
    base, factors = lk.split(params, plan, jax.random.key(0))
    return plan, base, moved(factors)


def classifier(folder, classes, rules, values=None):
    pretrained = load_bert(folder)
    params = classifier_params(pretrained, classes, jax.random.key(5))
    if values is not None:
        params["classifier"] = values
    return (*trained(params, rules), classifier_names(pretrained.config))


def merged(tmp_path, *options, code=0):
    command = ["merge", tmp_path / "a", "--base", tmp_path / "m", "--out", tmp_path / "out", "--json", *options]
    found = CliRunner().invoke(cli, [str(x) for x in command])
    if code:
        assert found.exit_code, found.output
        assert not (tmp_path / "out").exists()
        return found.output
    assert found.exit_code == 0, (found.output, found.exception)
    json.loads(found.stdout)
    return load_file(tmp_path / "out" / "model.safetensors")


def assert_carried(got, held, changed):
    """Every tensor is there and, but for the changed ones, the same bits."""
    assert got.keys() == held.keys()
    for name, x in held.items():
        assert got[name].dtype == x.dtype
        assert (got[name].tobytes() == x.tobytes()) != (name in changed), name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("form", ["orbax", "peft"])
def test_what_the_model_has_beside_its_encoder_stays(tmp_path, head, form):
    held = model_of(tmp_path / "m", head)
    pretrained = load_bert(tmp_path / "m")
    plan, base, factors = trained(pretrained.params, {QUERY: lk.LoRA(rank=2)})
    prefix = "" if head == "pooler" else "bert."
    if form == "orbax":
        lk.save_adapter(tmp_path / "a", plan, factors, base=base)
    else:
        names = {path: prefix + name for path, name in torch_names(pretrained.config).items()}
        lk.save_peft(tmp_path / "a", plan, factors, base=base, names=names)
    changed = {f"{prefix}encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)}
    got = merged(tmp_path)
    assert_carried(got, held, changed)
    wanted = flatten(lk.merge(base, factors, plan))[0]["layer_1/attention/query/kernel"]
    np.testing.assert_array_equal(got[f"{prefix}encoder.layer.1.attention.self.query.weight"], np.asarray(wanted).T)


@pytest.mark.parametrize(("head", "prefix"), [("pooler", "bert."), ("words", ""), ("classifier", "")])
def test_a_peft_adapter_may_call_the_encoder_otherwise_than_the_folder(tmp_path, head, prefix):
    held = model_of(tmp_path / "m", head)
    pretrained = load_bert(tmp_path / "m")
    plan, base, factors = trained(pretrained.params, {QUERY: lk.LoRA(rank=2)})
    names = {path: prefix + name for path, name in torch_names(pretrained.config).items()}
    lk.save_peft(tmp_path / "a", plan, factors, base=base, names=names)
    own = "" if head == "pooler" else "bert."
    assert_carried(merged(tmp_path), held, {f"{own}encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)})


def test_tensors_are_cast_and_counts_are_not(tmp_path):
    held = model_of(tmp_path / "m", "classifier")
    plan, base, factors = trained(load_bert(tmp_path / "m").params, {QUERY: lk.LoRA(rank=2)})
    lk.save_adapter(tmp_path / "a", plan, factors, base=base)
    got = merged(tmp_path, "--dtype", "float16")
    np.testing.assert_array_equal(got["classifier.weight"], held["classifier.weight"].astype(np.float16))
    np.testing.assert_array_equal(got["bert.embeddings.position_ids"], np.arange(5)[None])


@pytest.mark.parametrize("form", ["orbax", "peft"])
def test_a_trained_head_takes_the_place_of_the_models(tmp_path, form):
    held = model_of(tmp_path / "m", "classifier")
    rules = {f"encoder/{QUERY}": lk.LoRA(rank=2), "classifier/{kernel,bias}": lk.Full()}
    plan, base, factors, names = classifier(tmp_path / "m", 3, rules)
    if form == "orbax":
        lk.save_adapter(tmp_path / "a", plan, factors, base=base)
    else:
        lk.save_peft(tmp_path / "a", plan, factors, base=base, names=names, task_type="SEQ_CLS")
    got = merged(tmp_path)
    queries = {f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)}
    assert_carried(got, held, {*queries, "classifier.weight", "classifier.bias"})
    np.testing.assert_array_equal(got["classifier.weight"], np.asarray(factors["classifier/kernel"].value).T)


@pytest.mark.parametrize("rule", [{}, {"classifier/kernel": lk.LoRA(rank=1)}])
def test_a_head_that_was_not_trained_in_full_is_the_models(tmp_path, rule):
    held = model_of(tmp_path / "m", "classifier")
    head = {"kernel": jnp.asarray(held["classifier.weight"].T), "bias": jnp.asarray(held["classifier.bias"])}
    plan, base, factors, _ = classifier(tmp_path / "m", 3, {f"encoder/{QUERY}": lk.LoRA(rank=2)} | rule, head)
    lk.save_adapter(tmp_path / "a", plan, factors, base=base)
    changed = {f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)}
    assert_carried(merged(tmp_path), held, changed | ({"classifier.weight"} if rule else set()))


def test_a_head_joins_a_model_without_one_under_hugging_faces_names(tmp_path):
    held = model_of(tmp_path / "m", "pooler")
    plan, base, factors, _ = classifier(tmp_path / "m", 2, {"classifier/{kernel,bias}": lk.Full()})
    lk.save_adapter(tmp_path / "a", plan, factors, base=base)
    got = merged(tmp_path)
    head = {"classifier.weight": factors["classifier/kernel"].value.T, "classifier.bias": np.zeros(2, np.float32)}
    head["classifier.bias"] = np.asarray(factors["classifier/bias"].value)
    assert got.keys() == {f"bert.{name}" for name in held} | head.keys()
    for name, x in head.items():
        np.testing.assert_array_equal(got[name], x)
    np.testing.assert_array_equal(got["bert.pooler.dense.weight"], held["pooler.dense.weight"])


@pytest.mark.parametrize(
    ("head", "classes", "rules", "key", "says"),
    [
        ("classifier", 2, {"classifier/{kernel,bias}": lk.Full()}, 0, "of shape (2,), "),
        ("words", 2, {"classifier/bias": lk.Full()}, 0, "brings 'classifier.bias' alone"),
        ("words", 2, {"classifier/kernel": lk.LoRA(rank=1)}, 0, "has no 'classifier.weight' to change"),
        ("classifier", 3, {"classifier/kernel": lk.LoRA(rank=1)}, 5, "belongs to another base"),
    ],
)
def test_what_cannot_be_placed_is_refused(tmp_path, head, classes, rules, key, says):
    model_of(tmp_path / "m", head)
    params = classifier_params(load_bert(tmp_path / "m"), classes, jax.random.key(key))
    plan, base, factors = trained(params, rules)
    lk.save_adapter(tmp_path / "a", plan, factors, base=base)
    assert says in merged(tmp_path, code=2)


@pytest.mark.parametrize(("content", "says"), [("[]", "must be an object, not list"), ("{", "is not JSON")])
def test_a_config_that_is_no_object_says_so(tmp_path, content, says):
    model_of(tmp_path / "m", "classifier")
    plan, base, factors = trained(load_bert(tmp_path / "m").params, {QUERY: lk.LoRA(rank=2)})
    lk.save_adapter(tmp_path / "a", plan, factors, base=base)
    (tmp_path / "m" / "config.json").write_text(content)
    assert says in merged(tmp_path, code=2)


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_keeps_its_old_frequencies(tmp_path, tied):
    held = {name: x for name, x in tiny.weights().items() if not tied or name != "lm_head.weight"}
    held |= {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    (tmp_path / "m").mkdir()
    tiny.write_folder(tmp_path / "m", held, tie_word_embeddings=tied)
    split_in_two(tmp_path / "m")
    plan, base, factors = trained(load_llama(tmp_path / "m").params, {QUERY: lk.LoRA(rank=2)})
    lk.save_adapter(tmp_path / "a", plan, factors, base=base)
    names = [name for name in held if name.endswith("q_proj.weight")]
    assert_carried(merged(tmp_path), held, set(names))


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("place", ["m", "a", "m/inside", "a/inside", ".", "link"])
@pytest.mark.parametrize("command", ["merge", "convert", "combine"])
def test_what_is_read_is_not_written_over(tmp_path, command, place):
    model_of(tmp_path / "m", "classifier")
    plan, base, factors = trained(load_bert(tmp_path / "m").params, {QUERY: lk.LoRA(rank=2)})
    lk.save_adapter(tmp_path / "a", plan, factors, base=base)
    (tmp_path / "link").symlink_to(tmp_path / "m")
    before, a, out = files(tmp_path), str(tmp_path / "a"), str(tmp_path / place)
    ways = {
        "merge": [a, "--out", out],
        "combine": [a, a, "--out", out],
        "convert": ["--from", "orbax", a, "--to", "orbax", out],
    }
    found = CliRunner().invoke(cli, [command, *ways[command], "--base", str(tmp_path / "m"), "--overwrite"])
    assert "which is read: nothing was written" in found.output
    assert files(tmp_path) == before


def test_only_what_the_command_writes_is_replaced(tmp_path):
    model_of(tmp_path / "m", "classifier")
    plan, base, factors = trained(load_bert(tmp_path / "m").params, {QUERY: lk.LoRA(rank=2)})
    lk.save_adapter(tmp_path / "a", plan, factors, base=base)
    first = merged(tmp_path)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    options = ["--base", str(tmp_path / "m"), "--overwrite"]
    command = ["merge", str(tmp_path / "a"), "--out", str(tmp_path / "out"), *options]
    found = CliRunner().invoke(cli, command)
    assert "holds 'notes.txt', too, which is not written with such models" in found.output
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "out" / "notes.txt").unlink()
    assert merged(tmp_path, "--overwrite").keys() == first.keys()


@pytest.mark.parametrize("name", ["classifier.weight", "bert.encoder.layer.0.attention.self.query.weight"])
def test_a_dtype_that_cannot_hold_a_parameter_says_so(tmp_path, name):
    held = model_of(tmp_path / "m", "classifier")
    held[name][0, 0] = -1e6
    save_file(held, tmp_path / "m" / "model.safetensors")
    plan, base, factors = trained(load_bert(tmp_path / "m").params, {QUERY: lk.LoRA(rank=2)})
    lk.save_adapter(tmp_path / "a", plan, factors, base=base)
    says = merged(tmp_path, "--dtype", "float16", code=2)
    assert "has values up to 1e+06 once merged, which float16 cannot hold" in says
    assert name in says or "'layer_0/attention/query/kernel'" in says
    assert np.isfinite(merged(tmp_path, "--dtype", "bfloat16")[name].astype(np.float32)).all()
