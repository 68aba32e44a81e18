"""The real PEFT loads what we write, and we load what it writes: equal hidden states, equal tensors."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.core.paths import flatten
from lorax_kit.models import classifier_names
from tests.fixtures.recorded import CASES, CONFIG, NAMES, PEFT, base, encode, outputs

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers warns about a name that PEFT still uses
]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.fixtures import make_peft  # noqa: E402  (imports torch and PEFT)

LINEARS = "**/{query,key,value,output,up,down}/kernel"
SPECS = {
    "lora": {"**/{query,value}/kernel": lk.LoRA(rank=4, alpha=6)},
    "rslora": {LINEARS: lk.LoRA(rank=3, alpha=2, rslora=True)},
    "dora": {LINEARS: lk.DoRA(rank=3, alpha=2)},
    "dora_embedding": {"embeddings/word/embedding": lk.DoRA(rank=2, alpha=3)},
    "differing": {
        "layer_0/**/kernel": lk.LoRA(rank=2, alpha=1.5),
        "layer_1/attention/value/kernel": lk.LoRA(rank=7),
        "**/kernel": lk.LoRA(rank=4, alpha=1.5),
    },
    "embeddings": {"embeddings/{word,type}/embedding": lk.LoRA(rank=2, alpha=5), "**/key/kernel": lk.LoRA(rank=1)},
    "whole": {"**/query/kernel": lk.LoRA(rank=2), "**/norm/*": lk.Full(), "layer_1/mlp/{up,down}/kernel": lk.Full()},
}


@pytest.fixture(scope="module")
def params():
    return base()


def drawn(factors):
    """Factors moved at random, so that no update is zero."""
    leaves, tree = jax.tree.flatten(factors)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, moved)


@pytest.mark.parametrize("name", SPECS)
def test_peft_loads_what_we_write(name, params, tmp_path):
    recorded = outputs()
    inputs = recorded["ids"], recorded["mask"], recorded["types"]
    spec = lk.Spec(SPECS[name])
    plan = lk.resolve(spec, params, encode, *inputs)
    _, factors = lk.split(params, plan, jax.random.key(0))
    factors = drawn(factors)
    lk.save_peft(tmp_path / "x", plan, factors, base=params, names=NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of adapter weights that it misses
        model = peft.PeftModel.from_pretrained(make_peft.model(), tmp_path / "x").eval()
    ours = jax.jit(encode)(lk.merge(params, factors, plan), *inputs)
    assert np.abs(ours - recorded["base"]).max() > 0.1
    np.testing.assert_allclose(ours, make_peft.hidden(model).numpy(), atol=2e-5)


@pytest.mark.parametrize("name", SPECS)
def test_peft_has_the_same_tensors_and_writes_them_back_bitwise(name, params, tmp_path):
    spec = lk.Spec(SPECS[name])
    plan = lk.resolve(spec, params, encode, *(outputs()[x] for x in ("ids", "mask", "types")))
    _, factors = lk.split(params, plan, jax.random.key(0))
    factors = drawn(factors)
    lk.save_peft(tmp_path / "x", plan, factors, base=params, names=NAMES)
    peft.PeftModel.from_pretrained(make_peft.model(), tmp_path / "x").save_pretrained(tmp_path / "y")
    again = lk.load_peft(tmp_path / "y", base=params, names=NAMES)
    assert [s.setting.scale for s in again.plan.sites] == [s.setting.scale for s in plan.sites]
    for path, leaf in factors.items():
        for x, y in zip(leaf, again.factors[path], strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                np.testing.assert_array_equal(x, y, err_msg=path)
    merged, _ = flatten(lk.merge(params, again.factors, again.plan))
    for path, x in flatten(lk.merge(params, factors, plan))[0].items():
        np.testing.assert_array_equal(merged[path], x, err_msg=path)


@pytest.mark.parametrize("case", CASES)
def test_we_load_what_peft_writes_and_the_recording_is_current(case, params, tmp_path):
    recorded = outputs()
    model = make_peft.adapted(case)
    model.save_pretrained(tmp_path)
    there = make_peft.hidden(model).numpy()
    # Recorded on another processor: fp32 sums in another order.
    np.testing.assert_allclose(there, recorded[case], atol=1e-5)
    adapter = lk.load_peft(tmp_path, base=params, names=NAMES)
    merged = lk.merge(params, adapter.factors, adapter.plan)
    ours = jax.jit(encode)(merged, recorded["ids"], recorded["mask"], recorded["types"])
    np.testing.assert_allclose(ours, there, atol=1e-5)
    stored = lk.load_peft(PEFT / case, base=params, names=NAMES)
    assert stored.spec == adapter.spec


def test_gradients_of_the_factors_equal_torchs(params):
    recorded = outputs()
    inputs = recorded["ids"], recorded["mask"], recorded["types"]
    adapter = lk.load_peft(PEFT / "dora", base=params, names=NAMES)
    probe = np.random.default_rng(0).normal(size=recorded["dora"].shape).astype(np.float32)
    probe *= recorded["mask"][..., None]  # torch's embedding passes no gradient to its padding row
    adapted = lk.adapt(encode, adapter.plan)
    grads = jax.jit(jax.grad(lambda f: jnp.sum(adapted(params, f, *inputs) * probe)))(dict(adapter.factors))
    model = peft.PeftModel.from_pretrained(make_peft.model(), PEFT / "dora", is_trainable=True).eval()
    out = model(
        input_ids=make_peft.IDS, attention_mask=make_peft.MASK, token_type_ids=make_peft.TYPES
    ).last_hidden_state
    (out * torch.tensor(probe)).sum().backward()
    theirs = {name: x.grad.numpy() for name, x in model.named_parameters() if x.requires_grad}
    for path, g in grads.items():
        module = f"base_model.model.{NAMES[path].removesuffix('.weight')}"
        if path == "embeddings/word/embedding":
            pairs = [(g.a, "lora_embedding_A.default"), (g.b.T, "lora_embedding_B.default")]
        else:
            pairs = [(g.a, "lora_A.default.weight"), (g.b.T, "lora_B.default.weight")]
        for x, key in [*pairs, (g.magnitude, "lora_magnitude_vector.default.weight")]:
            expected = theirs[f"{module}.{key}"]
            np.testing.assert_allclose(
                x, expected, atol=1e-4 * max(1, np.abs(expected).max()), err_msg=f"{module}.{key}"
            )


def test_a_head_of_ours_loads_into_a_sequence_classifier(params, tmp_path):
    whole = {"encoder": params, "classifier": {"kernel": jnp.arange(48.0).reshape(16, 3), "bias": jnp.arange(3.0)}}
    spec = lk.Spec({"classifier/*": lk.Full(), "**/query/kernel": lk.LoRA(rank=2)})
    _, factors = lk.split(whole, lk.resolve(spec, whole), jax.random.key(0))
    lk.save_peft(tmp_path / "x", spec, drawn(factors), base=whole, names=classifier_names(CONFIG))
    config = transformers.BertConfig(**make_peft.SIZES, num_labels=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = peft.PeftModel.from_pretrained(transformers.BertForSequenceClassification(config), tmp_path / "x")
    head = model.merge_and_unload().classifier
    expected = drawn(factors)
    np.testing.assert_array_equal(head.weight.detach().numpy(), expected["classifier/kernel"].value.T)
    np.testing.assert_array_equal(head.bias.detach().numpy(), expected["classifier/bias"].value)
