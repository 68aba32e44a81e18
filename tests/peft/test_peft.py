"""PEFT folders: what torch recorded comes out of ours, and what we write is what PEFT wrote, bit for bit."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lorax_kit as lk
from lorax_kit.models import classifier_names
from tests.fixtures.recorded import CASES, CONFIG, NAMES, PEFT, base, encode, outputs

SCALES = {
    "lora": {"layer_0/attention/query/kernel": 5 / 3, "layer_1/attention/value/kernel": 5 / 3},
    "rslora": {"layer_1/attention/key/kernel": 3 / 2**0.5, "layer_1/mlp/up/kernel": 3 / 2**0.5},
    "dora": {"embeddings/word/embedding": 2.0, "layer_0/attention/output/kernel": 2.0},
    "patterns": {
        "layer_0/attention/query/kernel": 4.0,
        "layer_1/attention/query/kernel": 3.5,
        "layer_0/attention/value/kernel": 0.8,
        "layer_1/attention/output/kernel": 2.0,
    },
    "embedding": {"embeddings/word/embedding": 2.0, "layer_0/attention/value/kernel": 2.0},
    "whole": {"layer_1/attention/query/kernel": 1.0},
}


@pytest.fixture(scope="module")
def params():
    return base()


@pytest.fixture(scope="module")
def recorded():
    return outputs()


@pytest.fixture(scope="module")
def encoder():
    return jax.jit(encode)


def load(case, params):
    return lk.load_peft(PEFT / case, base=params, names=NAMES)


def same(one, two):
    """Equal structure, dtypes and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_the_base_computes_what_torch_recorded(params, recorded, encoder):
    out = encoder(params, recorded["ids"], recorded["mask"], recorded["types"])
    np.testing.assert_allclose(out, recorded["base"], atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_compute_what_torch_recorded(case, params, recorded, encoder):
    adapter = load(case, params)
    inputs = recorded["ids"], recorded["mask"], recorded["types"]
    assert np.abs(recorded[case] - recorded["base"]).max() > 0.1
    merged = lk.merge(params, adapter.factors, adapter.plan)
    np.testing.assert_allclose(encoder(merged, *inputs), recorded[case], atol=1e-5)


@pytest.mark.parametrize("case", ["dora", "patterns", "whole"])
def test_the_adapted_function_computes_what_torch_recorded(case, params, recorded):
    adapter = load(case, params)
    adapted = jax.jit(lk.adapt(encode, adapter.plan))
    out = adapted(params, adapter.factors, recorded["ids"], recorded["mask"], recorded["types"])
    np.testing.assert_allclose(out, recorded[case], atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_scales_and_the_content_of_the_config_are_kept(case, params):
    adapter = load(case, params)
    for path, scale in SCALES[case].items():
        assert adapter.plan.site(path).scale == scale
    assert adapter.meta == json.loads((PEFT / case / "adapter_config.json").read_text())
    assert adapter.spec == lk.Spec.from_json(adapter.spec.to_json())


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_is_what_peft_wrote_and_comes_back_bitwise(case, params, tmp_path):
    adapter = load(case, params)
    lk.save_peft(tmp_path / "x", adapter.plan, adapter.factors, base=params, names=NAMES)
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "x", PEFT / case))
    assert set(ours) == set(theirs)
    for name, x in theirs.items():
        assert ours[name].dtype == x.dtype
        np.testing.assert_array_equal(ours[name], x, err_msg=name)
    again = lk.load_peft(tmp_path / "x", base=params, names=NAMES)
    assert (again.spec, again.plan) == (adapter.spec, adapter.plan)
    same(again.factors, adapter.factors)


def test_an_embedding_is_one_without_a_plan_too(params, tmp_path):
    adapter = load("embedding", params)
    lk.save_peft(tmp_path / "x", adapter.spec, adapter.factors, base=params, names=NAMES)
    assert set(load_file(tmp_path / "x/adapter_model.safetensors")) == set(
        load_file(PEFT / "embedding/adapter_model.safetensors")
    )


def test_written_patterns_hit_one_module_each(params, tmp_path):
    adapter = load("patterns", params)
    lk.save_peft(tmp_path / "x", adapter.spec, adapter.factors, base=params, names=NAMES, base_model="me/bert")
    config = json.loads((tmp_path / "x/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 4, "me/bert")
    assert len(config["target_modules"]) == 6
    for pattern, values in (("rank_pattern", [1, 5, 5]), ("alpha_pattern", [7])):
        assert sorted(config[pattern].values()) == values
        for key in config[pattern]:
            # PEFT's own way to look a pattern up.
            assert sum(re.match(rf"(.*\.)?({key})$", m) is not None for m in config["target_modules"]) == 1


def test_a_module_trained_in_part_is_written_whole(params, tmp_path):
    spec = lk.Spec({"layer_0/attention/query/kernel": lk.LoRA(rank=2), "layer_1/mlp/down/bias": lk.Full()})
    plan = lk.resolve(spec, params)
    _, factors = lk.split(params, plan, jax.random.key(0))
    factors["layer_1/mlp/down/bias"] = lk.FullLeaf(jnp.arange(16.0))
    lk.save_peft(tmp_path / "x", spec, factors, base=params, names=NAMES)
    tensors = load_file(tmp_path / "x/adapter_model.safetensors")
    kernel = np.asarray(params["layer_1"]["mlp"]["down"]["kernel"])
    np.testing.assert_array_equal(tensors["base_model.model.encoder.layer.1.output.dense.weight"], kernel.T)
    np.testing.assert_array_equal(tensors["base_model.model.encoder.layer.1.output.dense.bias"], np.arange(16))
    again = lk.load_peft(tmp_path / "x", base=params, names=NAMES)
    assert {leaf.path for leaf in again.plan.full} == {"layer_1/mlp/down/bias", "layer_1/mlp/down/kernel"}
    same(lk.merge(params, again.factors, again.plan), lk.merge(params, factors, plan))


def test_a_classifiers_adapter_and_head_go_out_and_come_back(params, tmp_path):
    head = {"kernel": jax.random.normal(jax.random.key(1), (16, 3)), "bias": jnp.arange(3.0)}
    whole = {"encoder": params, "classifier": head}
    spec = lk.Spec({"classifier/*": lk.Full(), "**/{query,value}/kernel": lk.LoRA(rank=2)})
    _, factors = lk.split(whole, lk.resolve(spec, whole), jax.random.key(0))
    names = classifier_names(CONFIG)
    lk.save_peft(tmp_path / "x", spec, factors, base=whole, names=names)
    tensors = load_file(tmp_path / "x/adapter_model.safetensors")
    np.testing.assert_array_equal(tensors["base_model.model.classifier.weight"], head["kernel"].T)
    a = tensors["base_model.model.bert.encoder.layer.1.attention.self.value.lora_A.weight"]
    np.testing.assert_array_equal(a, factors["encoder/layer_1/attention/value/kernel"].a)
    same(lk.load_peft(tmp_path / "x", base=whole, names=names).factors, dict(sorted(factors.items())))


def test_a_name_that_ends_as_another_is_told_apart(tmp_path):
    params = {"up": {"kernel": jnp.ones((4, 3))}, "mlp": {"up": {"kernel": jnp.ones((4, 3))}}}
    names = {"up/kernel": "up.weight", "mlp/up/kernel": "mlp.up.weight"}
    spec = lk.Spec({"up/kernel": lk.LoRA(rank=1)})
    _, factors = lk.split(params, lk.resolve(spec, params), jax.random.key(0))
    lk.save_peft(tmp_path / "x", spec, factors, base=params, names=names)
    assert json.loads((tmp_path / "x/adapter_config.json").read_text())["target_modules"] == "(up)"
    assert lk.load_peft(tmp_path / "x", base=params, names=names).plan.trained == ("up/kernel",)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_attention_kernels_of_three_axes_are_flattened_and_found_again(tmp_path, variant):
    draw = jax.random.normal
    params = {"q": draw(jax.random.key(0), (6, 2, 4)), "o": draw(jax.random.key(1), (2, 4, 6))}

    def attend(p, x):
        return jnp.einsum("thd,hdo->to", jnp.einsum("ti,ihd->thd", x, p["q"]), p["o"])

    spec = lk.Spec({"{q,o}": lk.LoRA(rank=3, alpha=2, variant=variant)})
    plan = lk.resolve(spec, params, attend, jnp.ones((5, 6)))
    _, factors = lk.split(params, plan, jax.random.key(2))
    factors = {p: f._replace(b=draw(jax.random.key(3), f.b.shape)) for p, f in factors.items()}
    names = {"q": "q_proj.weight", "o": "o_proj.weight"}
    lk.save_peft(tmp_path / "x", plan, factors, base=params, names=names)
    tensors = load_file(tmp_path / "x/adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.o_proj.lora_{x}.weight"].astype(np.float64) for x in "AB")
    assert (a.shape, b.shape) == ((3, 8), (6, 3))
    if variant == "lora":
        merged = np.asarray(lk.merge(params, factors, plan)["o"]).reshape(8, 6)
        np.testing.assert_allclose(merged, params["o"].reshape(8, 6) + 2 / 3 * (b @ a).T, atol=1e-5)
    again = lk.load_peft(tmp_path / "x", base=params, names=names)
    assert again.plan.sites == plan.sites
    same(again.factors, factors)


@pytest.mark.parametrize("shape", [(5, 3), (4, 4)])
def test_a_matrix_kept_as_out_by_in_is_taken_the_way_it_fits(tmp_path, shape):
    params = {"layer": {"weight": jax.random.normal(jax.random.key(0), shape)}}  # as Equinox keeps it
    spec, names = lk.Spec({"layer/weight": lk.LoRA(rank=2)}), {"layer/weight": "layer.weight"}
    plan = lk.resolve(spec, params, lambda p, x: p["layer"]["weight"] @ x, jnp.ones(shape[1]))
    assert plan.sites[0].axes.inputs == (1,)
    _, factors = lk.split(params, plan, jax.random.key(1))
    lk.save_peft(tmp_path / "x", plan, factors, base=params, names=names)
    if shape == (4, 4):
        with pytest.raises(lk.AdapterError, match="in 2 ways"):
            lk.load_peft(tmp_path / "x", base=params, names=names)
    again = lk.load_peft(tmp_path / "x", base=params, names=names, plan=plan if shape == (4, 4) else None)
    assert again.plan.sites[0].axes == plan.sites[0].axes
    same(again.factors, factors)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_factors_keep_their_bits(params, tmp_path, dtype):
    spec = lk.Spec({"**/query/kernel": lk.LoRA(rank=2, dtype=dtype)})
    plan = lk.resolve(spec, params)
    _, factors = lk.split(params, plan, jax.random.key(0))
    lk.save_peft(tmp_path / "x", spec, factors, base=params, names=NAMES)
    again = lk.load_peft(tmp_path / "x", base=params, names=NAMES, dtype=None)
    assert {s.setting.dtype for s in again.plan.sites} == {dtype}
    same(again.factors, factors)
    wide = lk.load_peft(tmp_path / "x", base=params, names=NAMES)
    assert {s.setting.dtype for s in wide.plan.sites} == {"float32"}
    same(wide.factors, jax.tree.map(lambda x: x.astype(jnp.float32), factors))


def test_a_copy_of_the_frozen_embedding_is_accepted(params, tmp_path):
    """PEFT adds it to the tensors when it adapts a language model's embedding."""
    from tests.peft.peft_folder import Folder

    folder = Folder(tmp_path, "embedding")
    copy = np.asarray(params["embeddings"]["word"]["embedding"])
    folder.tensors["embeddings.word_embeddings.base_layer.weight"] = copy
    same(lk.load_peft(folder.write(), base=params, names=NAMES).factors, load("embedding", params).factors)
    folder.tensors["embeddings.word_embeddings.base_layer.weight"] = copy + 1
    with pytest.raises(lk.AdapterError, match="differs from the base and is not in modules_to_save"):
        lk.load_peft(folder.write(), base=params, names=NAMES)


def test_a_save_that_breaks_leaves_what_was_there(params, tmp_path, monkeypatch):
    from lorax_kit.peft import save

    adapter = load("lora", params)

    def write(**options):
        lk.save_peft(tmp_path / "x", adapter.spec, adapter.factors, base=params, names=NAMES, **options)

    write()
    before = {f.name: f.read_bytes() for f in (tmp_path / "x").iterdir()}

    def breaks(*_):
        raise OSError("disk full")

    with monkeypatch.context() as m:
        m.setattr(save, "write_tensors", breaks)
        with pytest.raises(OSError, match="disk full"):
            write(overwrite=True)
    assert {f.name: f.read_bytes() for f in (tmp_path / "x").iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["x"]
    with pytest.raises(lk.AdapterError, match=r"exists\.\n  choose another path"):
        write()
    write(overwrite=True)
    assert {f.name: f.read_bytes() for f in (tmp_path / "x").iterdir()} == before
