"""What the loader knows of each architecture: sizes, module, names of tensors, trained heads, what may be left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from lorax_kit.core.paths import TorchName
from lorax_kit.models.decoders.gpt2 import Gpt2Config, Gpt2Model
from lorax_kit.models.decoders.llama import LlamaModel
from lorax_kit.models.decoders.llama_config import FAMILIES as LLAMAS
from lorax_kit.models.decoders.llama_config import LlamaConfig
from lorax_kit.models.encoder_decoder.marian import MarianConfig, MarianModel
from lorax_kit.models.encoder_decoder.t5 import T5Config, T5Model
from lorax_kit.models.encoders.bert import BertConfig, BertEncoder
from lorax_kit.models.encoders.distilbert import DistilbertConfig, DistilbertEncoder
from lorax_kit.models.encoders.roberta import RobertaConfig, RobertaEncoder
from lorax_kit.models.stored.names import ROBERTAS, decoder_names, encoder_names, gpt2_names, marian_names, t5_names
from lorax_kit.models.stored.weights import Stored


class Saved(NamedTuple):
    """How transformers calls a class of models, and the prefix that the backbone's tensors have in it."""

    name: str
    prefix: str


class Family(NamedTuple):
    """What the loader knows of an architecture.

    Attributes:
      kind: "encoder", "decoder" or "encoder-decoder".
      config: config.json's content -> sizes.
      model: sizes -> module.
      names: config.json's content -> our path -> torch name, in the class that has the backbone under the first prefix.
      prefixes: under which the backbone's tensors lie, by the class that was saved.
      classes: "backbone", or the name of a head -> the class of transformers that has it.
      heads: name -> our path -> torch name, of the trained heads that a folder may have.
      left: pattern of tensors that the backbone does not read: other heads, constants.
      settled: (config.json's content, tensors) -> the content, where the tensors say what it does not; None: it does.
    """

    kind: str
    config: Callable[[Mapping[str, Any]], Any]
    model: Callable[[Any], nn.Module]
    names: Callable[[Mapping[str, Any]], Mapping[str, str]]
    prefixes: tuple[str, ...]
    classes: Mapping[str, Saved]
    heads: Mapping[str, Mapping[str, str]]
    left: str
    settled: Callable[[Mapping[str, Any], Stored], Mapping[str, Any]] | None = None

    def names_in(self, data: Mapping[str, Any], stored: Stored) -> dict[str, str]:
        """The names of the backbone's tensors in a folder: of the prefix under which the first of them lies."""
        first = next(iter(self.names(data).values())).removeprefix(self.prefixes[0])
        prefix = next((x for x in self.prefixes if x + first in stored.names), self.prefixes[0])
        return self.names_under(prefix, data)

    def names_under(self, prefix: str, data: Mapping[str, Any]) -> dict[str, str]:
        """The names of the backbone's tensors under a prefix; what is no part of the backbone has its own."""
        usual = self.prefixes[0]

        def moved(name: str) -> str:
            if prefix == usual or not name.startswith(usual):
                return name
            first = getattr(name, "inputs_first", False)
            return TorchName(prefix + name.removeprefix(usual), also=getattr(name, "also", None), inputs_first=first)

        return {path: moved(name) for path, name in self.names(data).items()}


def _linear(**modules: str) -> dict[str, str]:
    """Our path -> torch name of weight and bias of linear maps."""
    leaves = (("kernel", "weight"), ("bias", "bias"))
    return {f"{ours}/{leaf}": f"{name}.{end}" for ours, name in modules.items() for leaf, end in leaves}


def _encoder(name: str, prefix: str, config: Any, model: Any, classify: Mapping[str, str], left: str) -> Family:
    return Family(
        kind="encoder",
        config=config.from_dict,
        model=model,
        names=lambda data: encoder_names(data, prefix=prefix),
        prefixes=(prefix, ""),
        classes={
            "backbone": Saved(f"{name}Model", ""),
            "classify": Saved(f"{name}ForSequenceClassification", prefix),
            "answer": Saved(f"{name}ForQuestionAnswering", prefix),
        },
        heads={"classify": classify, "answer": _linear(output="qa_outputs")},
        left=rf"(.*\.)?embeddings\.(position_ids|token_type_ids)|{left}",
    )


def _decoder(
    name: str, config: Any, model: Any, names: Any, prefixes: tuple[str, ...], left: str, answer: str | None
) -> Family:
    """`answer`: the prefix in the class that answers; None: transformers has no such class."""
    answers = {} if answer is None else {"answer": Saved(f"{name}ForQuestionAnswering", answer)}
    heads: dict[str, dict[str, str]] = {"classify": {"output/kernel": "score.weight"}}
    return Family(
        kind="decoder",
        config=config.from_dict,
        model=model,
        names=names,
        prefixes=prefixes,
        classes={
            "backbone": Saved(f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}", prefixes[0]),
            "classify": Saved(f"{name}ForSequenceClassification", prefixes[0]),
            **answers,
        },
        heads=heads | ({"answer": _linear(output="qa_outputs")} if answers else {}),
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
    "bert.",
    BertConfig,
    BertEncoder,
    _linear(dense="bert.pooler.dense", output="classifier"),
    r"(bert\.)?pooler\..*|cls\..*",
)
_ROBERTAS = {
    family: _encoder(
        name,
        "roberta.",
        RobertaConfig,
        RobertaEncoder,
        _linear(dense="classifier.dense", output="classifier.out_proj"),
        r"(roberta\.)?pooler\..*|lm_head\..*",
    )
    for family, name in zip(ROBERTAS, ("Roberta", "XLMRoberta", "Camembert"), strict=True)
}
_DISTILBERT = _encoder(
    "DistilBert",
    "distilbert.",
    DistilbertConfig,
    DistilbertEncoder,
    _linear(dense="pre_classifier", output="classifier"),
    r"vocab_(transform|layer_norm|projector)\..*",
)
_GPT2 = _decoder(
    "GPT2",
    Gpt2Config,
    Gpt2Model,
    _split_gpt2_names,
    ("transformer.", ""),
    r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",  # causal masks
    answer="transformer.",
)
_ANSWERS = {"mistral": "model.", "gemma": None}


def _llama(family: str) -> Family:
    return _decoder(
        family.capitalize(),
        LlamaConfig,
        LlamaModel,
        decoder_names,
        ("model.", "transformer.", ""),
        r".*rotary_emb\.inv_freq",  # old folders hold the frequencies, which follow from the config
        answer=_ANSWERS.get(family, "transformer."),
    )


_T5 = Family(
    kind="encoder-decoder",
    config=T5Config.from_dict,
    model=T5Model,
    names=t5_names,
    prefixes=("",),
    classes={"backbone": Saved("T5ForConditionalGeneration", "")},
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
    classes={"backbone": Saved("MarianMTModel", "model.")},
    heads={},
    left=r"model\.(encoder|decoder)\.embed_positions\.weight",  # sinusoids
)
FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "distilbert": _DISTILBERT,
    **_ROBERTAS,
    "gpt2": _GPT2,
    **{name: _llama(name) for name in LLAMAS},
    "t5": _T5,
    "mt5": _T5._replace(classes={"backbone": Saved("MT5ForConditionalGeneration", "")}),
    "marian": _MARIAN,
}
"""Model type, as config.json has it -> its family."""
