"""Real BERT weights as params: MiniLM from its package, or any Hugging Face BERT folder on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jax import Array

from lorax_kit.assets import locate
from lorax_kit.models.encoders.bert import BertConfig
from lorax_kit.models.heads import fresh_head
from lorax_kit.models.stored.load import MINILM, read_backbone
from lorax_kit.models.stored.names import encoder_names
from lorax_kit.models.stored.weights import read_config


class Pretrained(NamedTuple):
    """An encoder with its weights.

    Attributes:
      config: its sizes.
      params: of `BertEncoder`, fp32.
      tokenizer_file: path of its tokenizer.json.
      source: what it was loaded from.
    """

    config: BertConfig
    params: dict[str, Any]
    tokenizer_file: Path
    source: str


def torch_names(config: BertConfig) -> dict[str, str]:
    """Our parameter path -> its Hugging Face name, for every parameter of the encoder.

    Kernels are (in, out) here and (out, in) there; everything else has one layout.
    """
    return encoder_names({"model_type": "bert", "num_hidden_layers": config.num_hidden_layers})


def classifier_names(config: BertConfig) -> dict[str, str]:
    """Our parameter path -> torch name, for every parameter of `BertClassifier`.

    The torch names are those of a module with the encoder as `bert` and the head as `classifier`, as in
    Hugging Face's BertForSequenceClassification (whose pooling is another: it reads the first token).
    """
    encoder = {f"encoder/{path}": f"bert.{name}" for path, name in torch_names(config).items()}
    return encoder | {"classifier/kernel": "classifier.weight", "classifier/bias": "classifier.bias"}


def load_bert(source: str | Path = "minilm") -> Pretrained:
    """Load a BERT encoder.

    Args:
      source: "minilm" (22.7M parameters, 6 layers, 384 wide, from its package), or a folder holding
        config.json, model.safetensors (or its parts and their index) and tokenizer.json.

    Raises:
      MissingPackageError: the MiniLM package is not installed.
      FileNotFoundError: the folder lacks a file.
      ValueError: damaged files, missing tensors or wrong shapes, tensors of the encoder that the config does not
        name (further layers), an architecture that is not this one.
    """
    folder = locate(*MINILM) if source == "minilm" else Path(source)
    backbone = read_backbone(folder, read_config(folder), ("bert",), heads=False)
    return Pretrained(backbone.config, backbone.params, folder / "tokenizer.json", str(source))


def classifier_params(pretrained: Pretrained, num_classes: int, key: Array) -> dict[str, Any]:
    """Params of `BertClassifier`: the encoder's own buffers, and a fresh head.

    The head's kernel (D, num_classes) is drawn from N(0, 0.02^2) as in BERT, its bias is zero.
    """
    head = fresh_head(pretrained.config.hidden_size, num_classes, key)
    return {"encoder": pretrained.params, "classifier": head["output"]}
