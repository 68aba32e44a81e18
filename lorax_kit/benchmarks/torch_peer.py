"""The peer: the same classifier, weights and batch in torch, trained in full and by PEFT.

The only file of the package that uses torch, transformers and PEFT (the `interop` extra).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from lorax_kit.benchmarks.case import Case
from lorax_kit.core.leaves import FactorTree
from lorax_kit.core.paths import flatten
from lorax_kit.methods import Factors
from lorax_kit.models.pretrained import classifier_names


def torch_steps(case: Case, factors: FactorTree, lr: float) -> dict[str, Callable[[], float]]:
    """Steps by name, each called for its loss: "torch_full" and "peft"; none without the interop extra.

    AdamW as in the other steps; no dropout; attention by torch's fused kernel; threads as torch chooses them. PEFT's
    adapters start from `factors`.
    """
    if not all(find_spec(name) for name in ("torch", "transformers", "peft")):
        return {}
    import peft
    import torch

    names = classifier_names(case.config)
    modules = {site.path: names[site.path].removesuffix(".weight") for site in case.plan.sites}
    rank = case.plan.sites[0].rank
    adapted = peft.get_peft_model(
        _classifier(case),
        peft.LoraConfig(
            r=rank,
            lora_alpha=round(case.scale * rank),
            target_modules=sorted(modules.values()),
            modules_to_save=["classifier"],
        ),
    )
    for path, module in modules.items():
        own: Any = adapted.get_submodule(f"base_model.model.{module}")
        drawn = factors[path]
        assert isinstance(drawn, Factors)
        for theirs, ours in ((own.lora_A, drawn.a), (own.lora_B, drawn.b.T)):
            theirs["default"].weight.data.copy_(torch.from_numpy(np.array(ours)))
    ids, mask, label = (torch.from_numpy(np.asarray(x).astype(np.int64)) for x in case.batch[:3])

    def stepper(model: Any) -> Callable[[], float]:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=1e-4)

        def step() -> float:
            optimizer.zero_grad(set_to_none=True)
            loss = torch.nn.functional.cross_entropy(model(ids, mask), label)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return step

    return {"torch_full": stepper(_classifier(case)), "peft": stepper(adapted)}


def _classifier(case: Case) -> Any:
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
            kept = mask[..., None].to(hidden.dtype)
            return self.classifier((hidden * kept).sum(1) / kept.sum(1).clamp(min=1))

    model = Classifier()
    weights = {}
    named, _ = flatten(case.params)
    for path, theirs in classifier_names(c).items():
        value = np.array(named[path])
        weights[theirs] = torch.from_numpy(np.ascontiguousarray(value.T if path.endswith("kernel") else value))
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
            model = peft.get_peft_model(_classifier(case), config, adapter_name=f"row_{i}")
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
