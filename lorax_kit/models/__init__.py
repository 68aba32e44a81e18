"""Reference models in Flax that read top to bottom, and loaders of their real weights."""

from lorax_kit.models.assets import MissingPackageError, locate
from lorax_kit.models.bert import BertClassifier, BertConfig, BertEncoder
from lorax_kit.models.pretrained import Pretrained, classifier_names, classifier_params, load_bert, torch_names
from lorax_kit.models.tokenizer import Tokenizer

__all__ = [
    "BertClassifier",
    "BertConfig",
    "BertEncoder",
    "MissingPackageError",
    "Pretrained",
    "Tokenizer",
    "classifier_names",
    "classifier_params",
    "load_bert",
    "locate",
    "torch_names",
]
