"""The peer: the same classifier, weights and batch in torch, trained in full and by PEFT.

The only file of the package that uses torch, transformers and PEFT (the `interop` extra).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np

from lorax_kit.benchmarks.case import Case
from lorax_kit.core.leaves import FactorTree
from lorax_kit.core.paths import flatten
from lorax_kit.methods import Factors
from lorax_kit.models import Loaded, llama_names
from lorax_kit.models.stored.encoder import classifier_names

PACKAGES = ("torch", "transformers", "peft")


class Pending:
    """The loss of a step that may still be running: `jax.block_until_ready` waits for it, `float` reads it."""

    def __init__(self, loss: Any) -> None:
        self._loss = loss

    def block_until_ready(self) -> Pending:
        """Wait for all that torch was asked to do."""
        if self._loss.is_cuda:
            import torch

            torch.cuda.synchronize()
        return self

    def __float__(self) -> float:
        return float(self._loss)


def lacking() -> str | None:
    """Why there is no peer here; None where there is one."""
    absent = [name for name in PACKAGES if not find_spec(name)]
    if absent:
        return f"{', '.join(absent)} not installed"
    if jax.default_backend() != "cpu" and _device() == "cpu":
        return f"torch has no {jax.default_backend()} here"
    return None


def _device() -> str:
    import torch

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def torch_steps(case: Case, factors: FactorTree, lr: float, *, compiled: bool = False) -> dict[str, Callable[[], Any]]:
    """Steps by name, each called for its loss: "torch_full" and "peft"; none where there is no peer.

    AdamW as in the other steps; no dropout; attention by torch's fused kernel; threads as torch chooses them; on a GPU
    the fused AdamW, and TF32 for fp32 products, as JAX has it. PEFT's adapters start from `factors`, in the dtype of
    the model. With `compiled` there is also "peft_compiled", the same model through `torch.compile`.
    """
    if lacking():
        return {}
    import peft
    import torch

    device, dtype = _device(), getattr(torch, str(jax.tree.leaves(case.params)[0].dtype))
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    names = classifier_names(case.config)
    modules = {site.path: names[site.path].removesuffix(".weight") for site in case.plan.sites}
    rank = case.plan.sites[0].rank

    def adapted() -> Any:
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=round(case.scale * rank),
            target_modules=sorted(modules.values()),
            modules_to_save=["classifier"],
        )
        model = peft.get_peft_model(_classifier(case, device, dtype), config, autocast_adapter_dtype=False)
        for path, module in modules.items():
            own: Any = model.get_submodule(f"base_model.model.{module}")
            drawn = factors[path]
            assert isinstance(drawn, Factors)
            for theirs, ours in ((own.lora_A, drawn.a), (own.lora_B, drawn.b.T)):
                theirs["default"].weight.data.copy_(_tensor(ours))
        return model

    inputs = (torch.from_numpy(np.asarray(x).astype(np.int64)).to(device) for x in case.batch[:3])
    ids, mask, label = inputs

    def stepper(model: Any) -> Callable[[], Pending]:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=1e-4, fused=True if device == "cuda" else None)

        def step() -> Pending:
            loss = torch.nn.functional.cross_entropy(model(ids, mask), label)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return Pending(loss.detach())

        return step

    steps = {"torch_full": stepper(_classifier(case, device, dtype)), "peft": stepper(adapted())}
    return steps | ({"peft_compiled": stepper(torch.compile(adapted()))} if compiled else {})


def peak_bytes(step: Callable[[], Any]) -> int | None:
    """What a torch step holds at most beyond what is there between steps, as its allocator counts; None on CPU."""
    import torch

    if _device() == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step().block_until_ready()
    return int(torch.cuda.max_memory_allocated() - before)


def release() -> None:
    """Give the memory that torch keeps for its next tensors back to the device, where torch was used at all."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tensor(x: Any) -> Any:
    """An array as a tensor of fp32: numpy's bfloat16 is none of torch's dtypes."""
    import torch

    return torch.from_numpy(np.array(x, np.float32, order="C"))


def _classifier(case: Case, device: str, dtype: Any) -> Any:
    """The case's model and weights in torch: encoder, mean over the tokens that count, linear head."""
    import torch
    import transformers

    c = case.config
    config = transformers.BertConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        intermediate_size=c.intermediate_size,
        max_position_embeddings=c.max_position_embeddings,
        type_vocab_size=c.type_vocab_size,
        layer_norm_eps=c.layer_norm_eps,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = transformers.BertModel(config, add_pooling_layer=False)
            self.classifier = torch.nn.Linear(c.hidden_size, case.model.num_classes)

        def forward(self, ids: Any, mask: Any) -> Any:
            hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
            kept = mask[..., None].float()
            pooled = (hidden.float() * kept).sum(1) / kept.sum(1).clamp(min=1)
            return self.classifier(pooled.to(hidden.dtype)).float()

    with torch.device(device):
        model = Classifier().to(dtype)
    weights = {}
    named, _ = flatten(case.params)
    for path, theirs in classifier_names(c).items():
        weights[theirs] = _tensor(named[path].T if path.endswith("kernel") else named[path])
    left_out = model.load_state_dict(weights, strict=False)
    missing = [name for name in left_out.missing_keys if not name.endswith(("position_ids", "token_type_ids"))]
    if missing or left_out.unexpected_keys:
        raise ValueError(f"the torch classifier lacks {missing}, and has no place for {left_out.unexpected_keys}.")
    return model.train()


def torch_mixed(case: Case, adapters: Sequence[tuple[int, FactorTree]]) -> dict[str, Callable[[], Any]]:
    """Evaluations by name: "peft_one", all rows with the last adapter, and "peft_mixed", row i with adapter i.

    None without the interop extra. PEFT's `adapter_names` groups the rows of each adapter at every site.

    Args:
      adapters: (rank, path -> LoRA's factors), one for each row of the case's batch, at the scale of the case.
    """
    if not all(find_spec(name) for name in ("torch", "transformers", "peft")):
        return {}
    import peft
    import torch

    names = classifier_names(case.config)
    modules = {site.path: names[site.path].removesuffix(".weight") for site in case.plan.sites}
    model: Any = None
    for i, (rank, factors) in enumerate(adapters):
        config = peft.LoraConfig(r=rank, lora_alpha=round(case.scale * rank), target_modules=sorted(modules.values()))
        if model is None:
            model = peft.get_peft_model(_classifier(case, "cpu", torch.float32), config, adapter_name=f"row_{i}")
        else:
            model.add_adapter(f"row_{i}", config)
        for path, module in modules.items():
            own: Any = model.get_submodule(f"base_model.model.{module}")
            for theirs, ours in ((own.lora_A, factors[path].a), (own.lora_B, factors[path].b.T)):
                theirs[f"row_{i}"].weight.data.copy_(torch.from_numpy(np.array(ours)))
    model.set_adapter(f"row_{len(adapters) - 1}")
    model.eval()
    ids, mask = (torch.from_numpy(np.asarray(x).astype(np.int64)) for x in case.batch[:2])

    def one() -> Any:
        with torch.inference_mode():
            return np.asarray(model(ids, mask))

    def mixed() -> Any:
        with torch.inference_mode():
            return np.asarray(model(ids, mask, adapter_names=[f"row_{i}" for i in range(len(adapters))]))

    return {"peft_one": one, "peft_mixed": mixed}


def thread_counts() -> list[int]:
    """As many threads as torch chooses, and one.

    Where another process takes a core, threads that wait for each other at every product are far slower than one: a
    token of SmolLM2 took 237 ms by two threads, and 37 ms by one, beside one busy process on two cores.
    """
    import torch

    return sorted({1, torch.get_num_threads()}) if _device() == "cpu" else [torch.get_num_threads()]


def torch_writer(loaded: Loaded) -> Callable[[Sequence[Sequence[int]], int, int], list[list[int]]]:
    """`write(prompts, new, threads)`: the greedy tokens of transformers' LLaMA with the same weights.

    Prompts are of one length.
    """
    import torch
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    c = loaded.config
    sizes = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    )
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    # No end of text: what `min_new_tokens` would do instead, keeping back a token that ours may write.
    config = TheirConfig(**{name: getattr(c, name) for name in sizes}, rope_parameters=rope, eos_token_id=None)
    model = LlamaForCausalLM(config).eval().to(_device())
    params, _ = flatten(loaded.params)
    tensors = {}
    for path, name in llama_names(c).items():
        x = params[path]
        tensors[str(name)] = _tensor(x.T if path.endswith("kernel") else x)
    missing, surplus = model.load_state_dict(tensors, strict=False)
    if surplus or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"torch's model lacks {missing} and does not know {surplus}.")
    model.tie_weights()

    def write(prompts: Sequence[Sequence[int]], new: int, threads: int) -> list[list[int]]:
        torch.set_num_threads(threads)
        ids = torch.tensor(prompts, device=_device())
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0
            )
        written: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return written

    return write
