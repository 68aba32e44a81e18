"""`lorax-kit convert`, `combine` and `merge` on a small BERT folder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import lorax_kit as lk
from lorax_kit.cli import cli
from lorax_kit.core.paths import flatten
from lorax_kit.models import classifier_params, load_bert, load_model
from tests.draws import moved
from tests.models.test_families import copied
from tests.models.test_pretrained import write_folder

KERNELS = "layer_*/attention/{query,value}/kernel"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "bert"
    write_folder(folder)
    return folder


def saved(model, path, setting, seed=0):
    params = load_bert(model).params
    plan = lk.resolve(lk.Spec({KERNELS: setting}), params)
    base, factors = lk.split(params, plan, jax.random.key(seed))
    factors = jax.tree.map(lambda x: x * (1 + 0.1 * seed), moved(factors))
    lk.save_adapter(path, plan, factors, base=base)
    return base, plan, factors


def call(*arguments, code=0):
    found = CliRunner().invoke(cli, [*map(str, arguments)])
    if code:
        return found.output
    assert found.exit_code == 0, (found.output, found.exception)
    return json.loads(found.stdout)


def weights(params):
    return {p: np.asarray(x) for p, x in flatten(params)[0].items()}


@pytest.mark.parametrize("setting", [lk.LoRA(rank=2, alpha=3), lk.DoRA(rank=2), lk.IA3(feedforward=True)], ids=str)
def test_an_adapter_goes_to_peft_and_back_unchanged(model, tmp_path, setting):
    base, plan, factors = saved(model, tmp_path / "ours", setting)
    there = ("convert", "--from", "orbax", tmp_path / "ours", "--to", "peft", tmp_path / "peft", "--base", model)
    found = call(*there, "--json")
    assert {site["method"] for site in found["sites"]} == {setting.kind}
    back = ("convert", "--from", "peft", tmp_path / "peft", "--to", "orbax", tmp_path / "again", "--base", model)
    call(*back, "--json")
    again = lk.load_adapter(tmp_path / "again", base=base)
    merged, wanted = (weights(lk.merge(base, *pair)) for pair in ((again.factors, again.plan), (factors, plan)))
    for path, x in wanted.items():
        np.testing.assert_allclose(merged[path], x, rtol=1e-6, atol=1e-6)
    assert "exists" in call(*back, code=2)


def test_any_method_becomes_plain_lora_of_a_stated_error(model, tmp_path):
    base, plan, factors = saved(model, tmp_path / "ours", lk.DoRA(rank=2))
    command = ("convert", "--from", "orbax", tmp_path / "ours", "--base", model, "--json")
    whole = call(*command, "--to", "orbax", tmp_path / "whole", "--lora")
    assert max(whole["errors"].values()) < 1e-5
    low = call(*command, "--to", "orbax", tmp_path / "low", "--lora", "--rank", 2)
    assert {site["rank"] for site in low["sites"]} == {2}
    loaded = lk.load_adapter(tmp_path / "low", base=base)
    start, got, want = (
        weights(x) for x in (base, lk.merge(base, loaded.factors, loaded.plan), lk.merge(base, factors, plan))
    )
    for site in plan.sites:
        delta = want[site.path] - start[site.path]
        error = np.linalg.norm(got[site.path] - want[site.path]) / np.linalg.norm(delta)
        assert abs(error - low["errors"][site.path]) < 1e-4


def test_adapters_are_combined_on_their_updates(model, tmp_path):
    base, plan, one = saved(model, tmp_path / "a", lk.LoRA(rank=1, alpha=2))
    _, other_plan, two = saved(model, tmp_path / "b", lk.LoRA(rank=2, alpha=2), seed=3)
    out = ("--base", model, "--out", tmp_path / "c", "--json")
    found = call(
        "combine", tmp_path / "a", tmp_path / "b", "--how", "svd", "--rank", 3, "--weight", 2, "--weight", -1, *out
    )
    assert max(site["error"] for site in found["sites"]) < 1e-5
    made = lk.load_adapter(tmp_path / "c", base=base)
    assert made.meta["weights"] == [2.0, -1.0]
    start, got = weights(base), weights(lk.merge(base, made.factors, made.plan))
    first, second = weights(lk.merge(base, one, plan)), weights(lk.merge(base, two, other_plan))
    for site in plan.sites:
        wanted = 2 * (first[site.path] - start[site.path]) - (second[site.path] - start[site.path])
        np.testing.assert_allclose(got[site.path] - start[site.path], wanted, atol=2e-5)


def test_heads_of_different_beginnings_are_averaged_and_never_added(model, tmp_path):
    heads = []
    for seed in (0, 1):
        params = classifier_params(load_bert(model), 2, jax.random.key(seed))
        plan = lk.resolve(lk.Spec({f"encoder/{KERNELS}": lk.LoRA(rank=1), "classifier/*": lk.Full()}), params)
        _, factors = lk.split(params, plan, jax.random.key(seed))
        factors = moved(factors)
        heads.append(np.asarray(factors["classifier/kernel"].value))
        lk.save_adapter(tmp_path / str(seed), plan, factors, base=params)
    command = ("combine", tmp_path / "0", tmp_path / "1", "--base", model, "--out", tmp_path / "c", "--json")
    for more in ((), ("--how", "ties", "--density", 0.5, "--weight", 0.5, "--weight", 0.5)):
        assert "where each adapter began is not known" in call(*command, *more, code=2)
    assert not (tmp_path / "c").exists()
    call(*command, "--weight", 0.5, "--weight", 0.5)
    made = lk.load_adapter(tmp_path / "c", base=params)
    np.testing.assert_allclose(made.factors["classifier/kernel"].value, (heads[0] + heads[1]) / 2, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_model_is_a_folder_that_loads(model, tmp_path, dtype):
    base, plan, factors = saved(model, tmp_path / "a", lk.LoRA(rank=2, alpha=3))
    found = call("merge", tmp_path / "a", "--base", model, "--out", tmp_path / "m", "--dtype", dtype, "--json")
    assert found["tensors"] == len(weights(base))
    merged = weights(lk.merge(base, factors, plan))
    loaded = weights(load_bert(tmp_path / "m").params)
    for path, x in merged.items():
        wanted = np.asarray(jnp.asarray(x).astype(dtype).astype(jnp.float32))
        np.testing.assert_array_equal(loaded[path], wanted)
    names = load_file(tmp_path / "m" / "model.safetensors")
    assert names["encoder.layer.0.attention.self.query.weight"].dtype == np.dtype(jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("convert", "--from", "peft", "{a}", "--to", "orbax", "{new}"), "is an adapter of orbax, not of peft"),
        (
            ("convert", "--from", "orbax", "{a}", "--to", "orbax", "{new}", "--rank", "1"),
            "is for the plain LoRA of --lora",
        ),
        (
            ("convert", "--from", "orbax", "{a}", "--to", "orbax", "{new}", "--task-type", "SEQ_CLS"),
            "stand in PEFT's config",
        ),
        (("convert", "--from", "orbax", "{empty}", "--to", "peft", "{new}"), "is no adapter"),
        (("combine", "{a}", "{a}", "--how", "mean", "--out", "{new}"), "how is 'mean'; choose from"),
        (("combine", "{a}", "{a}", "--weight", "1", "--out", "{new}"), "1 weights"),
        (("combine", "{a}", "{a}", "--seed", "5", "--out", "{new}"), "a seed is for the ways that draw"),
        (("merge", "{a}", "--out", "{empty}"), "exists"),
    ],
)
def test_bad_input_says_so_and_leaves_nothing(model, tmp_path, arguments, says):
    saved(model, tmp_path / "a", lk.LoRA(rank=1))
    (tmp_path / "empty").mkdir()
    places = {name: str(tmp_path / name) for name in ("a", "new", "empty")}
    assert says in call(*(x.format(**places) for x in arguments), "--base", model, code=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty"]


@pytest.mark.parametrize("family", ["gpt2", "marian", "qwen2", "qwen3_classify", "roberta", "t5"])
def test_adapters_of_every_family_go_to_peft_and_back_and_into_their_model(tmp_path, family):
    folder = copied(family, tmp_path / "model")
    params = load_model(folder).params
    plan = lk.resolve(lk.Spec({"**/{query,value,up}/kernel": lk.LoRA(rank=2, alpha=3)}), params)
    base, factors = lk.split(params, plan, jax.random.key(0))
    factors = moved(factors)
    lk.save_adapter(tmp_path / "ours", plan, factors, base=base)
    wanted = weights(lk.merge(base, factors, plan))
    options = ("--base", folder, "--json")
    call("convert", "--from", "orbax", tmp_path / "ours", "--to", "peft", tmp_path / "peft", *options)
    call("convert", "--from", "peft", tmp_path / "peft", "--to", "orbax", tmp_path / "again", *options)
    again = lk.load_adapter(tmp_path / "again", base=base)
    call("merge", tmp_path / "ours", "--out", tmp_path / "merged", *options)
    for got in (lk.merge(base, again.factors, again.plan), load_model(tmp_path / "merged").params):
        for path, x in weights(got).items():
            np.testing.assert_allclose(x, wanted[path], rtol=1e-6, atol=1e-6, err_msg=path)
