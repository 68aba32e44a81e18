"""The real PEFT on transformers' own models: what we write it runs to equal logits, what it writes we merge to them."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.core.method import METHODS as core_methods
from lorax_kit.core.method import frozen_leaves
from lorax_kit.core.paths import flatten
from lorax_kit.models import (
    BertEncoder,
    LlamaConfig,
    LlamaModel,
    MissingPackageError,
    decoder_names,
    gpt2_names,
    load_bert,
    torch_names,
)
from lorax_kit.peft.layout import in_torch
from lorax_kit.peft.names import Names
from tests.fixtures.recorded_methods import CASES, base, expected, folder, names
from tests.peft.test_peft_methods import READ, traced

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.fixtures import torch_tiny  # noqa: E402  (imports torch)

LLAMA = {
    **{"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5},
}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
IDS = np.random.default_rng(0).integers(0, 50, (2, 10)).astype(np.int32)
ONES = np.ones_like(IDS)


def drawn(make, config):
    torch.manual_seed(0)
    model = make(config)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.2 * torch.randn_like(x))
    return model.eval()


def llama(tied=False):
    config = {**LLAMA, "tie_word_embeddings": tied, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    return drawn(transformers.LlamaForCausalLM, transformers.LlamaConfig(**config))


def gpt2():
    return drawn(transformers.GPT2LMHeadModel, transformers.GPT2Config(**GPT2))


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS, dtype=torch.long)).logits.numpy()


def params_of(model, known):
    """Our params of a torch model, by names of it."""
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    params = {}
    for path, name in known.items():
        text, _, rows = str(name).partition("[")
        x = state[text]
        if rows:
            first, last = map(int, rows.rstrip("]").split(":"))
            x = x[..., first:last]
        node = params
        *modules, leaf = path.split("/")
        for m in modules:
            node = node.setdefault(m, {})
        node[leaf] = jnp.asarray(x.T if leaf == "kernel" and not getattr(name, "inputs_first", False) else x)
    return params


def with_weights(model, params, known):
    """The torch model with the weights of our params."""
    named = flatten(params)[0]
    torch_side = Names(known, named)
    state = model.state_dict()
    for name, places in torch_side.places.items():
        parts = [in_torch(p.path, named[p.path], p.path in torch_side.inputs_first) for p in places]
        state[name] = torch.tensor(np.array(np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]))
        for other in torch_side.also[places[0].path] or ():
            state[other] = state[name]
    model.load_state_dict(state)
    return model


def moved(factors, plan):
    rng = np.random.default_rng(1)
    held = {site.path: frozen_leaves(site.setting) for site in plan.sites}

    def move(path, leaves):
        new = {
            k: x * (1 + 0.1 * jnp.asarray(rng.normal(size=x.shape), x.dtype))
            + 0.05 * jnp.asarray(rng.normal(size=x.shape), x.dtype)
            for k, x in leaves._asdict().items()
            if x is not None and k not in held.get(path, ())
        }
        return leaves._replace(**new)

    return {path: move(path, leaves) for path, leaves in factors.items()}


@pytest.mark.parametrize("case", READ)
def test_peft_runs_what_we_write_of_every_recorded_folder(case, tmp_path):
    kind = CASES[case]
    model = torch_tiny.model(kind)
    known = names(kind)
    if kind == "mixture":  # parameters of one module in torch's own order
        order = [name for name, _ in model.named_parameters()]
        known = dict(sorted(known.items(), key=lambda pair: order.index(pair[1])))
    adapter = lk.load_peft(folder(case), base=base(kind), names=known, plan=traced(case))
    lk.save_peft(tmp_path / "x", adapter.plan, adapter.factors, base=base(kind), names=known)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "x").eval()
    ours = torch_tiny.outputs(loaded.double(), kind).numpy()
    np.testing.assert_allclose(ours, expected(case), rtol=0, atol=3e-6 * max(1, np.abs(expected(case)).max()))


METHODS = {
    "lora": lk.LoRA(rank=3, alpha=5),
    "rslora": lk.LoRA(rank=3, alpha=5, rslora=True),
    "pissa": lk.LoRA(rank=3, alpha=5, start="pissa"),
    "olora": lk.LoRA(rank=3, alpha=5, start="olora"),
    "dora": lk.DoRA(rank=3, alpha=5),
    "miss": lk.MiSS(rank=4),
    "delora": lk.DeLoRA(rank=3),
    "hra": lk.HRA(rank=4),
    "ia3": lk.IA3(),
    "ia3_feedforward": lk.IA3(feedforward=True),
    "adalora": lk.AdaLoRA(rank=4, alpha=5),
}
for _name, _rank in (("vera", 7), ("loha", 2), ("lokr", 2)):
    METHODS[_name] = core_methods[_name].setting(rank=_rank)


@pytest.mark.parametrize("method", METHODS)
def test_llama_under_every_method_gives_equal_logits_both_ways(method, tmp_path):
    model = llama()
    config = LlamaConfig(**LLAMA, rope_theta=500.0, tie_word_embeddings=False)
    known = decoder_names({**LLAMA, "model_type": "llama"})
    params = params_of(model, known)

    def fn(p, ids):
        return LlamaModel(config).apply({"params": p}, ids, ONES)

    plan = lk.resolve(lk.Spec({"**/{query,value,down}/kernel": METHODS[method]}), params, fn, IDS)
    factors = moved(lk.split(params, plan, jax.random.key(0))[1], plan)
    plain, ours = jax.jit(lambda p, f: (fn(p, IDS), fn(lk.merge(p, f, plan), IDS)))(params, factors)
    assert np.abs(plain - ours).max() > 1e-2
    lk.save_peft(tmp_path / "x", plan, factors, base=params, names=known, task_type="CAUSAL_LM")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "x").eval()
    np.testing.assert_allclose(ours, logits(theirs), rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "y")
    again = lk.load_peft(tmp_path / "y", base=params, names=known)
    back = jax.jit(lambda p, f: fn(lk.merge(p, f, again.plan), IDS))(params, again.factors)
    np.testing.assert_allclose(back, logits(theirs), rtol=0, atol=1e-5)


GPT = {
    "fused": (False, {"**/{qkv,output,up,down}/kernel": lk.LoRA(rank=3, alpha=5)}),
    "dora": (False, {"**/{qkv,up}/kernel": lk.DoRA(rank=3, alpha=5)}),
    "parts": (True, {"**/{query,value}/kernel": lk.LoRA(rank=3, alpha=5), "**/up/kernel": lk.LoRA(rank=2)}),
    "three_parts": (True, {"**/{query,key,value}/kernel": lk.LoRA(rank=2, alpha=5, rslora=True)}),
    "tied": (False, {"embeddings/token/embedding": lk.LoRA(rank=3), "**/qkv/kernel": lk.LoRA(rank=2)}),
    "tokens": (False, {"embeddings/token/embedding": lk.Rows(rows=(3, 7, 1)), "**/qkv/kernel": lk.LoRA(rank=2)}),
    "tokens_alone": (False, {"embeddings/token/embedding": lk.Rows(rows=(3, 7, 1))}),
    "whole": (False, {"**/up/*": lk.Full(), "**/qkv/kernel": lk.LoRA(rank=2), "norm/*": lk.Full()}),
    "tied_whole": (False, {"embeddings/token/embedding": lk.Full(), "**/qkv/kernel": lk.LoRA(rank=2)}),
    "biases": (False, {"**/qkv/{kernel}": lk.LoRA(rank=2), "**/qkv/bias": lk.Full()}),
    "all_biases": (True, {"**/query/kernel": lk.LoRA(rank=2), "**/bias": lk.Full()}),
}


@pytest.mark.parametrize("case", GPT)
def test_gpt2_gives_equal_logits_both_ways(case, tmp_path):
    split, rules = GPT[case]
    model = gpt2()
    known = gpt2_names({**GPT2, "model_type": "gpt2"}, split=split)
    params = params_of(model, known)
    plan = lk.resolve(lk.Spec(rules), params)
    factors = moved(lk.split(params, plan, jax.random.key(0))[1], plan)
    lk.save_peft(tmp_path / "x", plan, factors, base=params, names=known)
    theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "x").eval()
    merged = lk.merge(params, factors, plan)
    ours = logits(with_weights(gpt2(), merged, known))
    assert np.abs(ours - logits(model)).max() > 1e-2
    np.testing.assert_allclose(ours, logits(theirs), rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "y")
    again = lk.load_peft(tmp_path / "y", base=params, names=known)
    back = logits(with_weights(gpt2(), lk.merge(params, again.factors, again.plan), known))
    np.testing.assert_allclose(back, logits(theirs), rtol=0, atol=1e-5)


def test_minilm_gives_equal_hidden_states(tmp_path):
    try:
        loaded = load_bert("minilm")
    except MissingPackageError as e:
        pytest.skip(str(e))
    config = transformers.BertConfig(**vars(loaded.config))
    known = torch_names(loaded.config)

    def model():
        return with_weights(transformers.BertModel(config, add_pooling_layer=False).eval(), loaded.params, known)

    spec = lk.Spec({"**/{query,value}/kernel": lk.LoRA(rank=8, alpha=16), "embeddings/word/embedding": lk.LoRA(rank=4)})
    plan = lk.resolve(spec, loaded.params)
    factors = moved(lk.split(loaded.params, plan, jax.random.key(0))[1], plan)
    ids = np.random.default_rng(0).integers(0, 3000, (2, 16)).astype(np.int32)
    ones, types = np.ones_like(ids), np.zeros_like(ids)
    merged = lk.merge(loaded.params, factors, plan)
    ours = jax.jit(lambda p: BertEncoder(loaded.config).apply({"params": p}, ids, ones, types))(merged)
    lk.save_peft(tmp_path / "x", plan, factors, base=loaded.params, names=known)
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path / "x").eval()
    with torch.no_grad():
        hidden = theirs(input_ids=torch.tensor(ids, dtype=torch.long)).last_hidden_state.numpy()
    np.testing.assert_allclose(ours, hidden, rtol=0, atol=1e-5)
    again = lk.load_peft(tmp_path / "x", base=loaded.params, names=known)
    for path, leaves in factors.items():
        np.testing.assert_array_equal(again.factors[path].a, leaves.a)


def test_auto_classes_read_what_names_its_base(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    known = decoder_names({**LLAMA, "model_type": "llama"})
    params = params_of(model, known)
    plan = lk.resolve(lk.Spec({"**/query/kernel": lk.LoRA(rank=2)}), params)
    factors = moved(lk.split(params, plan, jax.random.key(0))[1], plan)
    options = {"base": params, "names": known, "base_model": str(tmp_path / "base")}
    lk.save_peft(tmp_path / "task", plan, factors, **options, task_type="CAUSAL_LM")
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    lk.save_peft(tmp_path / "class", plan, factors, **options, auto_mapping=mapping)
    want = logits(with_weights(llama(), lk.merge(params, factors, plan), known))
    for auto, where in ((peft.AutoPeftModelForCausalLM, "task"), (peft.AutoPeftModel, "class")):
        loaded = auto.from_pretrained(str(tmp_path / where)).eval()
        np.testing.assert_allclose(logits(loaded), want, rtol=0, atol=1e-5)
    for wrong in ({"task_type": "TRANSLATION"}, {"auto_mapping": {"base_model_class": "X"}}):
        with pytest.raises(lk.AdapterError):
            lk.save_peft(tmp_path / "no", plan, factors, **options, **wrong)


WRITTEN = {
    "an_absent_target": ({"target_modules": ["q_proj", "absent"]}, "matches nothing"),
    "an_absent_exclude": ({"target_modules": "all-linear", "exclude_modules": ["absent"]}, "matches nothing"),
    "many_targets": ({"target_modules": "all-linear"}, None),
    "no_bias_to_train": ({"target_modules": ["q_proj"], "bias": "lora_only"}, None),
    "equal_copies": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, None),
    "tied_asked_for": (
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
        None,
    ),
    "exact_names": (
        {"target_modules": ["model.layers.0.self_attn.q_proj", "down_proj"], "layers_to_transform": [1]},
        None,
    ),
    "pattern": ({"target_modules": r".*\.1\..*(q|v)_proj", "exclude_modules": r".*v_proj"}, None),
    "velora": ({"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "r": 2}, None),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_folders_that_peft_writes_of_a_tied_llama(case, tmp_path):
    settings, note = WRITTEN[case]
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **settings})
    model = peft.get_peft_model(llama(tied=True), config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.requires_grad and not ("modules_to_save" in name and "lm_head" in name):
                x.add_(0.1 * torch.randn_like(x))
        if case == "equal_copies":
            head = model.base_model.model.lm_head.modules_to_save["default"].weight
            head.copy_(model.base_model.model.model.embed_tokens.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    known = decoder_names({**LLAMA, "model_type": "llama", "tie_word_embeddings": True})
    params = params_of(llama(tied=True), known)
    adapter = lk.load_peft(tmp_path, base=params, names=known)
    ours = logits(with_weights(llama(tied=True), lk.merge(params, adapter.factors, adapter.plan), known))
    np.testing.assert_allclose(ours, logits(model), rtol=0, atol=1e-5)
    if note is not None:
        assert any(note in line for line in adapter.meta["notes"])


def test_half_precision_adapters_are_read_into_float32(tmp_path):
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        for x in model.parameters():
            if x.requires_grad:
                x.add_(0.1 * torch.randn_like(x))
                x.data = x.data.bfloat16()
    model.save_pretrained(tmp_path)
    known = decoder_names({**LLAMA, "model_type": "llama"})
    params = params_of(llama(), known)
    wide = lk.load_peft(tmp_path, base=params, names=known)
    assert {str(x.dtype) for x in jax.tree.leaves(wide.factors)} == {"float32"}
    kept = lk.load_peft(tmp_path, base=params, names=known, dtype=None)
    dtypes = {p: {str(x.dtype) for x in leaves if x is not None} for p, leaves in kept.factors.items()}
    assert dtypes.pop("head/kernel") == {"float32"}  # its base is
    assert set(map(frozenset, dtypes.values())) == {frozenset({"bfloat16"})}
    for one, two in zip(jax.tree.leaves(wide.factors), jax.tree.leaves(kept.factors), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(two, np.float32))


def test_the_config_is_one_that_peft_accepts_in_full(tmp_path):
    """PEFT drops keys that it does not know with a warning: none of ours is one."""
    known = decoder_names({**LLAMA, "model_type": "llama"})
    params = params_of(llama(), known)
    for method, setting in METHODS.items():
        plan = lk.resolve(lk.Spec({"**/query/kernel": setting}), params)
        lk.save_peft(tmp_path / method, plan, lk.split(params, plan, jax.random.key(0))[1], base=params, names=known)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            peft.PeftConfig.from_pretrained(str(tmp_path / method))
        assert json.loads((tmp_path / method / "adapter_config.json").read_text())["inference_mode"]
