"""Reference models in Flax that read top to bottom, and loaders of their real weights."""

from lorax_kit.assets import MissingPackageError, locate
from lorax_kit.models.bert import BertClassifier, BertConfig, BertEncoder
from lorax_kit.models.llama import LlamaModel
from lorax_kit.models.llama_config import LlamaConfig
from lorax_kit.models.lstm import LstmClassifier, LstmConfig
from lorax_kit.models.stored.decoder import PretrainedLlama, llama_names, load_llama
from lorax_kit.models.stored.encoder import Pretrained, classifier_names, classifier_params, load_bert, torch_names
from lorax_kit.models.stored.load import Loaded, Special, load_model
from lorax_kit.models.stored.names import decoder_names, encoder_names, gpt2_names, t5_names
from lorax_kit.models.tokenizer import Tokenizer

__all__ = [
    "BertClassifier",
    "BertConfig",
    "BertEncoder",
    "LlamaConfig",
    "LlamaModel",
    "Loaded",
    "LstmClassifier",
    "LstmConfig",
    "MissingPackageError",
    "Pretrained",
    "PretrainedLlama",
    "Special",
    "Tokenizer",
    "classifier_names",
    "classifier_params",
    "decoder_names",
    "encoder_names",
    "gpt2_names",
    "llama_names",
    "load_bert",
    "load_llama",
    "load_model",
    "locate",
    "t5_names",
    "torch_names",
]
