"""What the loader knows of each architecture: sizes, module, names of tensors, trained heads, what may be left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from lorax_kit.core.paths import TorchName
from lorax_kit.models.bert import BertConfig, BertEncoder
from lorax_kit.models.distilbert import DistilbertConfig, DistilbertEncoder
from lorax_kit.models.encoder_decoder.marian import MarianConfig, MarianModel
from lorax_kit.models.encoder_decoder.t5 import T5Config, T5Model
from lorax_kit.models.gpt2 import Gpt2Config, Gpt2Model
from lorax_kit.models.llama import LlamaModel
from lorax_kit.models.llama_config import FAMILIES as LLAMAS
from lorax_kit.models.llama_config import LlamaConfig
from lorax_kit.models.roberta import RobertaConfig, RobertaEncoder
from lorax_kit.models.stored.names import ROBERTAS, decoder_names, encoder_names, gpt2_names, marian_names, t5_names
from lorax_kit.models.stored.weights import Stored


class Family(NamedTuple):
    """What the loader knows of an architecture.

    Attributes:
      kind: "encoder", "decoder" or "encoder-decoder".
      config: config.json's content -> sizes.
      model: sizes -> module.
      names: config.json's content -> our path -> torch name, in the class that has the backbone under the first prefix.
      prefixes: under which the backbone's tensors lie, by the class that was saved.
      classes: what was loaded ("backbone", or the name of a head) -> how transformers calls the class.
      heads: name -> our path -> torch name, of the trained heads that a folder may have.
      left: pattern of tensors that the backbone does not read: other heads, constants.
      settled: (config.json's content, tensors) -> the content, where the tensors say what it does not; None: it does.
    """

    kind: str
    config: Callable[[Mapping[str, Any]], Any]
    model: Callable[[Any], nn.Module]
    names: Callable[[Mapping[str, Any]], Mapping[str, str]]
    prefixes: tuple[str, ...]
    classes: Mapping[str, str]
    heads: Mapping[str, Mapping[str, str]]
    left: str
    settled: Callable[[Mapping[str, Any], Stored], Mapping[str, Any]] | None = None

    def names_in(self, data: Mapping[str, Any], stored: Stored) -> dict[str, str]:
        """The names of the backbone's tensors in a folder: of the prefix under which the first of them lies."""
        names, usual = self.names(data), self.prefixes[0]
        first = next(iter(names.values())).removeprefix(usual)
        prefix = next((x for x in self.prefixes if x + first in stored.names), usual)
        return {path: _moved(name, usual, prefix) for path, name in names.items()}


def _moved(name: str, usual: str, prefix: str) -> str:
    """A name under another prefix; a tensor that is no part of the backbone keeps its own."""
    if prefix == usual or not name.startswith(usual):
        return name
    first = getattr(name, "inputs_first", False)
    return TorchName(prefix + name.removeprefix(usual), also=getattr(name, "also", None), inputs_first=first)


def _linear(**modules: str) -> dict[str, str]:
    """Our path -> torch name of weight and bias of linear maps."""
    leaves = (("kernel", "weight"), ("bias", "bias"))
    return {f"{ours}/{leaf}": f"{name}.{end}" for ours, name in modules.items() for leaf, end in leaves}


def _classes(name: str, backbone: str) -> dict[str, str]:
    """How transformers calls a family's models."""
    heads = {"classify": f"{name}ForSequenceClassification", "answer": f"{name}ForQuestionAnswering"}
    return {"backbone": f"{name}{backbone}", **heads}


def _encoder(name: str, config: Any, model: Any, classify: Mapping[str, str], left: str) -> Family:
    prefix = f"{name.lower()}."
    return Family(
        kind="encoder",
        config=config.from_dict,
        model=model,
        names=lambda data: encoder_names(data, prefix=prefix),
        prefixes=(prefix, ""),
        classes=_classes(name, "Model"),
        heads={"classify": classify, "answer": _linear(output="qa_outputs")},
        left=rf"(.*\.)?embeddings\.(position_ids|token_type_ids)|{left}",
    )


def _decoder(name: str, config: Any, model: Any, names: Any, prefixes: tuple[str, ...], left: str) -> Family:
    return Family(
        kind="decoder",
        config=config.from_dict,
        model=model,
        names=names,
        prefixes=prefixes,
        classes=_classes(name, "LMHeadModel" if name == "GPT2" else "ForCausalLM"),
        heads={"classify": {"output/kernel": "score.weight"}, "answer": _linear(output="qa_outputs")},
        left=left,
    )


def _split_gpt2_names(data: Mapping[str, Any]) -> dict[str, str]:
    return gpt2_names(data, split=True)


def _t5_head(data: Mapping[str, Any], stored: Stored) -> dict[str, Any]:
    """Whether the head is the embedding, as the tensors say.

    tie_word_embeddings says in older files whether hidden states are divided before the head; transformers 5 writes
    true into every file, with scale_decoder_outputs beside it.
    """
    head, table = "lm_head.weight", "shared.weight"
    tied = head not in stored.names or (table in stored.names and stored.equal(head, table))
    scaled = data.get("scale_decoder_outputs", data.get("tie_word_embeddings", True))
    return {**data, "tie_word_embeddings": tied, "scale_decoder_outputs": scaled}


_BERT = _encoder(
    "Bert",
    BertConfig,
    BertEncoder,
    _linear(dense="bert.pooler.dense", output="classifier"),
    r"(bert\.)?pooler\..*|cls\..*",
)
_ROBERTA = _encoder(
    "Roberta",
    RobertaConfig,
    RobertaEncoder,
    _linear(dense="classifier.dense", output="classifier.out_proj"),
    r"(roberta\.)?pooler\..*|lm_head\..*",
)
_DISTILBERT = _encoder(
    "DistilBert",
    DistilbertConfig,
    DistilbertEncoder,
    _linear(dense="pre_classifier", output="classifier"),
    r"vocab_(transform|layer_norm|projector)\..*",
)
_CAUSAL_MASKS = r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"
_GPT2 = _decoder("GPT2", Gpt2Config, Gpt2Model, _split_gpt2_names, ("transformer.", ""), _CAUSAL_MASKS)
_FREQUENCIES = r".*rotary_emb\.inv_freq"  # old folders hold them; they follow from the config
_LLAMAS = {
    name: _decoder(
        {"llama": "Llama"}.get(name, name.capitalize()),
        LlamaConfig,
        LlamaModel,
        decoder_names,
        ("model.", "transformer.", ""),
        _FREQUENCIES,
    )
    for name in LLAMAS
}
_T5 = Family(
    kind="encoder-decoder",
    config=T5Config.from_dict,
    model=T5Model,
    names=t5_names,
    prefixes=("",),
    classes={"backbone": "T5ForConditionalGeneration"},
    heads={},
    left=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",  # in T5 1.0, never read
    settled=_t5_head,
)
_MARIAN = Family(
    kind="encoder-decoder",
    config=MarianConfig.from_dict,
    model=MarianModel,
    names=marian_names,
    prefixes=("model.",),
    classes={"backbone": "MarianMTModel"},
    heads={},
    left=r"model\.(encoder|decoder)\.embed_positions\.weight",  # sinusoids
)
FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "distilbert": _DISTILBERT,
    **dict.fromkeys(ROBERTAS, _ROBERTA),
    "gpt2": _GPT2,
    **_LLAMAS,
    "t5": _T5,
    "mt5": _T5._replace(classes={"backbone": "MT5ForConditionalGeneration"}),
    "marian": _MARIAN,
}
"""Model type, as config.json has it -> its family."""
