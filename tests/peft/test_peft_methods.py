"""Folders that the real PEFT wrote for every method: read to the formulas' weights, written back, read again."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import lorax_kit as lk
from lorax_kit.core.method import frozen_leaves
from lorax_kit.core.paths import flatten
from tests.fixtures.recorded_methods import CASES, apply, base, expected, folder, inputs, names, tree
from tests.methods.peft_oracle import merged
from tests.peft.peft_folder import write

REFUSED = {
    "miss_bat": "MiSS with init_weights 'bat' moves the base by its own blocks",
    "tied_input_only": "PEFT adapts 'model.embed_tokens.weight' alone, and here one parameter, 'embeddings/embedding'",
}
READ = [case for case in CASES if case not in REFUSED]
# Written in another form than they were read in: PiSSA's and OLoRA's rows as plain LoRA of twice the rank.
ANOTHER_FORM = {"pissa", "olora"}
NOTES = {
    "lora_layer_exact": ["layers_to_transform has 1, where no module is targeted"],
    "saved_bias": [
        "the tensor 'head.modules_to_save.bias' repeats 'head.bias'",
        "the tensor 'head.original_module.bias' repeats 'head.bias'",
    ],
}


def traced(case):
    """A plan that says which axes are contracted, where names and shapes do not."""
    kind = CASES[case]
    if kind != "mixture":
        return None
    spec = lk.Spec({"{experts,transposed}/{up,down}": lk.LoRA(rank=2)})
    return lk.resolve(spec, base(kind), apply(kind), inputs(kind))


def load(case):
    return lk.load_peft(folder(case), base=base(CASES[case]), names=names(CASES[case]), plan=traced(case))


def weights(case, adapter):
    return flatten(lk.merge(base(CASES[case]), adapter.factors, adapter.plan))[0]


@pytest.mark.parametrize("case", READ)
def test_merged_weights_are_those_of_the_formulas(case):
    adapter = load(case)
    want = flatten(tree(CASES[case], merged(case)))[0]
    for path, x in weights(case, adapter).items():
        np.testing.assert_allclose(x, want[path], rtol=0, atol=1e-6, err_msg=path)
    notes = adapter.meta.get("notes", [])
    schedule = [line for line in notes if line.endswith("changes the training alone")]
    assert [line for line in notes if line not in schedule] == NOTES.get(case, [])
    assert {k: v for k, v in adapter.meta.items() if k != "notes"} == json.loads(
        (folder(case) / "adapter_config.json").read_text()
    )


@pytest.mark.parametrize(
    "case", ["lora_bias", "vera", "lokr", "hra", "ia3", "delora", "adalora_masked", "conv_lora", "parameters"]
)
def test_the_adapted_function_computes_what_torch_recorded(case):
    kind, adapter = CASES[case], load(case)
    out = jax.jit(lk.adapt(apply(kind), adapter.plan))(base(kind), adapter.factors, inputs(kind))
    np.testing.assert_allclose(out, expected(case), rtol=0, atol=3e-6 * max(1, np.abs(expected(case)).max()))


@pytest.mark.parametrize("case", READ)
def test_what_is_written_comes_back(case, tmp_path):
    adapter, kind = load(case), CASES[case]
    lk.save_peft(tmp_path / "x", adapter.plan, adapter.factors, base=base(kind), names=names(kind))
    again = lk.load_peft(tmp_path / "x", base=base(kind), names=names(kind), plan=adapter.plan)
    if case in ANOTHER_FORM:
        for path, x in weights(case, adapter).items():
            np.testing.assert_allclose(weights(case, again)[path], x, rtol=0, atol=1e-6, err_msg=path)
        return
    assert again.plan == adapter.plan
    for path, leaves in adapter.factors.items():
        for name, x in leaves._asdict().items():
            if x is not None:
                np.testing.assert_array_equal(getattr(again.factors[path], name), x, err_msg=f"{name} of {path}")


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_parameter_or_form_cannot_hold_says(case):
    with pytest.raises(lk.AdapterError) as e:
        load(case)
    assert REFUSED[case] in str(e.value)
    assert len(str(e.value).splitlines()) <= 4


def test_a_tied_folder_without_knowledge_of_the_tie_says():
    plain = {path: str(name) for path, name in names("llama").items()}
    with pytest.raises(lk.AdapterError, match="also the output head of the model"):
        lk.load_peft(folder("tied_input_only"), base=base("llama"), names=plain)
    known = plain | {"embeddings/embedding": ("model.embed_tokens.weight", "lm_head.weight")}
    again = lk.load_peft(folder("tied"), base=base("llama"), names=known)
    assert again.plan.site("embeddings/embedding").use == "tied"
    with pytest.raises(lk.AdapterError, match=r"is also 'lm_head\.weight'"):
        lk.load_peft(folder("tied_input_only"), base=base("llama"), names=known)
    spec = lk.Spec({"embeddings/embedding": lk.LoRA(rank=2), "**/query/kernel": lk.LoRA(rank=2)})
    plan = lk.resolve(spec, base("llama"), apply("llama"), inputs("llama"))
    assert plan.site("embeddings/embedding").use == "tied"
    with pytest.raises(lk.AdapterError, match="looked up and multiplied with"):
        lk.load_peft(folder("tied_input_only"), base=base("llama"), names=plain, plan=plan)


def test_a_tied_folder_over_a_head_of_its_own_is_exact(tmp_path):
    params, untied = base("llama"), names("llama")
    params["head"] = {"kernel": params["embeddings"]["embedding"].T}
    untied = {p: str(n) for p, n in untied.items()} | {"head/kernel": "lm_head.weight"}
    for case in ("tied", "tied_input_only"):
        adapter = lk.load_peft(folder(case), base=params, names=untied)
        got, want = flatten(lk.merge(params, adapter.factors, adapter.plan))[0], merged(case)
        np.testing.assert_allclose(got["embeddings/embedding"], want["model.embed_tokens.weight"], atol=1e-6)
        np.testing.assert_allclose(got["head/kernel"], want["lm_head.weight"].T, atol=1e-6)


def test_ranks_above_the_sides_are_reduced_exactly_on_request(tmp_path):
    rng = np.random.default_rng(0)
    params = {"q": {"kernel": rng.normal(size=(4, 6)).astype(np.float32)}}
    a, b = rng.normal(size=(9, 4)).astype(np.float32), rng.normal(size=(6, 9)).astype(np.float32)
    for dora, rslora in ((False, False), (False, True), (True, False)):
        config = {
            "peft_type": "LORA",
            "r": 9,
            "lora_alpha": 3,
            "use_rslora": rslora,
            "use_dora": dora,
            "target_modules": ["q"],
        }
        tensors = {"q.lora_A.weight": a, "q.lora_B.weight": b}
        want = params["q"]["kernel"] + 3 / (3 if rslora else 9) * (a.T.astype(float) @ b.T)
        if dora:
            tensors["q.lora_magnitude_vector"] = m = np.arange(1, 7).astype(np.float32)
            want = want * m / np.linalg.norm(want, axis=0)
        path = write(tmp_path / f"{dora}{rslora}", config, tensors)
        with pytest.raises(lk.AdapterError, match=r"rank 9 at 'q/kernel' is above min\(in, out\) = 4"):
            lk.load_peft(path, base=params, names={"q/kernel": "q.weight"})
        adapter = lk.load_peft(path, base=params, names={"q/kernel": "q.weight"}, reduce_ranks=True)
        assert adapter.plan.sites[0].rank == 4
        assert adapter.plan.sites[0].scale == pytest.approx(1 if rslora else 1 / 3)
        np.testing.assert_allclose(lk.merge(params, adapter.factors, adapter.plan)["q"]["kernel"], want, atol=2e-6)


STACKED = {"up": {"kernel": (3, 4, 6), "bias": (3, 6)}, "table": {"embedding": (7, 4)}}


def stacked():
    keys = iter(jax.random.split(jax.random.key(0), 9))
    params = jax.tree.map(lambda s: jax.random.normal(next(keys), s), STACKED, is_leaf=lambda x: isinstance(x, tuple))
    apart = {f"up_{i}": {k: x[i] for k, x in params["up"].items()} for i in range(3)}
    return params, {"table": params["table"], **apart}


STACKED_NAMES = {"up/kernel": "layers.{}.up.weight", "up/bias": "layers.{}.up.bias", "table/embedding": "table.weight"}
APART_NAMES = {
    f"up_{i}/{ours}": f"layers.{i}.up.{end}" for i in range(3) for ours, end in (("kernel", "weight"), ("bias", "bias"))
}
APART_NAMES |= {"table/embedding": "table.weight"}


def scanned(p, ids):
    x = p["table"]["embedding"][ids]

    def step(x, layer):
        return x + (x @ layer["kernel"] + layer["bias"][None]) @ np.ones((6, 4), np.float32), None

    return jax.lax.scan(step, x, p["up"])[0]


@pytest.mark.parametrize(
    "setting",
    [
        lk.LoRA(rank=2, alpha=3),
        lk.DoRA(rank=2, alpha=3),
        lk.IA3(feedforward=True),
        lk.MiSS(rank=3),
        lk.DeLoRA(rank=2),
        lk.HRA(rank=2),
        lk.AdaLoRA(rank=3),
        lk.VeRA(rank=5),
        lk.LoHa(rank=2, alpha=3),
        lk.LoKr(rank=1, alpha=3),
    ],
    ids=lambda s: s.kind,
)
def test_scanned_layers_are_a_module_each_and_come_back(setting, tmp_path):
    params, apart = stacked()
    plan = lk.resolve(lk.Spec({"up/kernel": setting}), params, scanned, np.arange(3))
    _, factors = lk.split(params, plan, jax.random.key(1))
    factors = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(2), x.shape), factors)
    if held := frozen_leaves(setting) - {"a0", "b0"}:
        start = lk.split(params, plan, jax.random.key(1))[1]["up/kernel"]
        factors["up/kernel"] = factors["up/kernel"]._replace(**{k: getattr(start, k) for k in held})
    lk.save_peft(tmp_path / "x", plan, factors, base=params, names=STACKED_NAMES)
    again = lk.load_peft(tmp_path / "x", base=params, names=STACKED_NAMES, plan=plan)
    assert [(s.axes, s.use, s.scale) for s in again.plan.sites] == [(s.axes, s.use, s.scale) for s in plan.sites]
    for x, y in zip(factors["up/kernel"], again.factors["up/kernel"], strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            np.testing.assert_array_equal(x, y)
    single = lk.load_peft(tmp_path / "x", base=apart, names=APART_NAMES)
    one = lk.merge(params, factors, plan)["up"]["kernel"]
    for i in range(3):
        got = lk.merge(apart, single.factors, single.plan)[f"up_{i}"]["kernel"]
        np.testing.assert_allclose(got, one[i], atol=1e-6)


def test_layers_of_unequal_ranks_and_without_an_adapter_make_one_stacked_site(tmp_path):
    params, apart = stacked()
    spec = lk.Spec({"up_0/kernel": lk.LoRA(rank=1, alpha=5), "up_2/kernel": lk.LoRA(rank=3, alpha=2)})
    plan = lk.resolve(spec, apart)
    _, factors = lk.split(apart, plan, jax.random.key(1))
    factors = {p: f._replace(b=jax.random.normal(jax.random.key(2), f.b.shape)) for p, f in factors.items()}
    lk.save_peft(tmp_path / "x", plan, factors, base=apart, names=APART_NAMES)
    joined = lk.load_peft(tmp_path / "x", base=params, names=STACKED_NAMES)
    assert joined.plan.sites[0].rank == 3
    want = lk.merge(apart, factors, plan)
    got = lk.merge(params, joined.factors, joined.plan)["up"]["kernel"]
    for i in range(3):
        np.testing.assert_allclose(got[i], want[f"up_{i}"]["kernel"], atol=1e-6)


def test_stacked_biases_trained_in_full_are_a_tensor_each(tmp_path):
    params, _ = stacked()
    spec = lk.Spec({"up/kernel": lk.LoRA(rank=2), "up/bias": lk.Full()})
    plan = lk.resolve(spec, params, scanned, np.arange(3))
    _, factors = lk.split(params, plan, jax.random.key(1))
    factors["up/bias"] = lk.FullLeaf(factors["up/bias"].value + 1)
    lk.save_peft(tmp_path / "x", plan, factors, base=params, names=STACKED_NAMES)
    config = json.loads((tmp_path / "x/adapter_config.json").read_text())
    assert (config["bias"], config["modules_to_save"]) == ("all", None)
    again = lk.load_peft(tmp_path / "x", base=params, names=STACKED_NAMES, plan=plan)
    np.testing.assert_array_equal(again.factors["up/bias"].value, factors["up/bias"].value)


FUSED = {"q/kernel": "qkv.weight[0:4]", "k/kernel": "qkv.weight[4:6]", "v/kernel": "qkv.weight[6:9]"}


def test_parts_of_a_fused_parameter_are_one_module_of_the_sum_of_their_ranks(tmp_path):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {n: {"kernel": jax.random.normal(k, (5, w))} for n, k, w in zip("qkv", keys, (4, 2, 3), strict=True)}
    spec = lk.Spec({"q/kernel": lk.LoRA(rank=2, alpha=4), "v/kernel": lk.LoRA(rank=3, alpha=9)})
    plan = lk.resolve(spec, params)
    _, factors = lk.split(params, plan, jax.random.key(1))
    factors = {p: f._replace(b=jax.random.normal(jax.random.key(2), f.b.shape)) for p, f in factors.items()}
    lk.save_peft(tmp_path / "x", plan, factors, base=params, names=FUSED)
    config = json.loads((tmp_path / "x/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 10)
    want = lk.merge(params, factors, plan)
    fused = {"qkv": {"kernel": np.concatenate([params[n]["kernel"] for n in "qkv"], axis=1)}}
    whole = lk.load_peft(tmp_path / "x", base=fused, names={"qkv/kernel": "qkv.weight"})
    got = lk.merge(fused, whole.factors, whole.plan)["qkv"]["kernel"]
    np.testing.assert_allclose(got, np.concatenate([want[n]["kernel"] for n in "qkv"], axis=1), atol=1e-6)
    with pytest.raises(lk.AdapterError, match="is above"):
        lk.load_peft(tmp_path / "x", base=params, names=FUSED)
    split = lk.load_peft(tmp_path / "x", base=params, names=FUSED, reduce_ranks=True)
    for n in "qkv":
        got = lk.merge(params, split.factors, split.plan)[n]["kernel"]
        np.testing.assert_allclose(got, want[n]["kernel"], atol=1e-6)
    dora = lk.resolve(lk.Spec({"q/kernel": lk.DoRA(rank=2)}), params)
    with pytest.raises(lk.AdapterError, match="is fused of 3 parameters, and dora with magnitude cannot be joined"):
        lk.save_peft(tmp_path / "y", dora, lk.split(params, dora, jax.random.key(0))[1], base=params, names=FUSED)


def test_a_gain_over_outputs_also_multiplies_peft_s_bias(tmp_path):
    params = {"k": {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2, np.float32)}}
    known = {"k/kernel": "k.weight", "k/bias": "k.bias"}
    spec = lk.Spec({"k/kernel": lk.IA3(), "k/bias": lk.Full()})
    plan = lk.resolve(spec, params)
    gain = np.asarray([2.0, 3.0], np.float32)
    factors = lk.split(params, plan, jax.random.key(0))[1]
    factors = factors | {"k/kernel": factors["k/kernel"]._replace(gain=gain)}
    with pytest.raises(lk.AdapterError, match="PEFT multiplies the bias of 'k' by its gain"):
        lk.save_peft(tmp_path / "x", plan, factors, base=params, names=known)
    factors["k/bias"] = lk.FullLeaf(gain)
    lk.save_peft(tmp_path / "x", plan, factors, base=params, names=known)
    again = lk.load_peft(tmp_path / "x", base=params, names=known)
    np.testing.assert_array_equal(again.factors["k/bias"].value, gain)
    np.testing.assert_array_equal(again.factors["k/kernel"].gain, gain)


def test_a_full_leaf_beside_a_quantised_kernel_is_saved(tmp_path):
    params = {"up": {"kernel": jax.random.normal(jax.random.key(0), (64, 64)), "bias": np.zeros(64, np.float32)}}
    params["q"] = {"kernel": jax.random.normal(jax.random.key(1), (64, 64))}
    base_ = lk.quantize(params, ["up/kernel"], "int8")
    spec = lk.Spec({"up/bias": lk.Full(), "q/kernel": lk.LoRA(rank=2)})
    plan = lk.resolve(spec, base_)
    known = {"up/kernel": "up.weight", "up/bias": "up.bias", "q/kernel": "q.weight"}
    lk.save_peft(tmp_path / "x", plan, lk.split(base_, plan, jax.random.key(0))[1], base=base_, names=known)
    stored = load_file(tmp_path / "x/adapter_model.safetensors")["base_model.model.up.weight"]
    np.testing.assert_allclose(stored, params["up"]["kernel"].T, atol=0.05)


def test_an_output_embedding_is_a_linear_layer(tmp_path):
    params = {"head": {"embedding": jax.random.normal(jax.random.key(0), (9, 4))}}
    plan = lk.resolve(
        lk.Spec({"head/embedding": lk.LoRA(rank=2)}),
        params,
        lambda p, x: x @ p["head"]["embedding"].T,
        np.ones((1, 4), np.float32),
    )
    factors = lk.split(params, plan, jax.random.key(1))[1]
    lk.save_peft(tmp_path / "x", plan, factors, base=params, names={"head/embedding": "head.weight"})
    again = lk.load_peft(tmp_path / "x", base=params, names={"head/embedding": "head.weight"})
    np.testing.assert_array_equal(again.factors["head/embedding"].a, factors["head/embedding"].a)
    assert again.factors["head/embedding"].a.shape == (2, 4)


@pytest.mark.parametrize("inputs_of", [(0,), (1,)])
def test_inputs_of_a_square_kernel_are_the_plans(tmp_path, inputs_of):
    params = {"q": {"kernel": jax.random.normal(jax.random.key(0), (4, 4))}}
    plan = lk.resolve(lk.Spec({"q/kernel": lk.LoRA(rank=2, inputs=inputs_of)}), params)
    factors = lk.split(params, plan, jax.random.key(1))[1]
    factors = {p: f._replace(b=jax.random.normal(jax.random.key(2), f.b.shape)) for p, f in factors.items()}
    lk.save_peft(tmp_path / "x", plan, factors, base=params, names={"q/kernel": "q.weight"})
    tensors = load_file(tmp_path / "x/adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.q.lora_{x}.weight"].astype(float) for x in "AB")
    torch_delta = b @ a  # (out, in)
    delta = np.asarray(lk.merge(params, factors, plan)["q"]["kernel"] - params["q"]["kernel"])
    np.testing.assert_allclose(delta.T if inputs_of == (0,) else delta, torch_delta, atol=1e-6)
    again = lk.load_peft(tmp_path / "x", base=params, names={"q/kernel": "q.weight"}, plan=plan)
    want = np.asarray(lk.merge(params, factors, plan)["q"]["kernel"])
    np.testing.assert_allclose(lk.merge(params, again.factors, again.plan)["q"]["kernel"], want, atol=1e-6)
