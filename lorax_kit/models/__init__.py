"""Reference models in Flax that read top to bottom, and loaders of their real weights."""

from lorax_kit.extras import need

need("models", "flax")

from lorax_kit.assets import MissingPackageError, locate
from lorax_kit.models.decoders.gpt2 import Gpt2Config, Gpt2Model
from lorax_kit.models.decoders.llama import LlamaModel
from lorax_kit.models.decoders.llama_config import LlamaConfig
from lorax_kit.models.encoder_decoder.marian import MarianConfig, MarianModel
from lorax_kit.models.encoder_decoder.t5 import T5Config, T5Model
from lorax_kit.models.encoders.bert import BertClassifier, BertConfig, BertEncoder
from lorax_kit.models.encoders.distilbert import DistilbertConfig, DistilbertEncoder
from lorax_kit.models.encoders.roberta import RobertaConfig, RobertaEncoder
from lorax_kit.models.heads import answer, classify, fresh_head, word_logits
from lorax_kit.models.lstm import LstmClassifier, LstmConfig
from lorax_kit.models.stored.decoder import PretrainedLlama, llama_names, load_llama
from lorax_kit.models.stored.encoder import Pretrained, classifier_names, classifier_params, load_bert, torch_names
from lorax_kit.models.stored.load import Loaded, Special, load_model
from lorax_kit.models.stored.names import decoder_names, encoder_names, gpt2_names, marian_names, t5_names
from lorax_kit.models.stored.save import save_model
from lorax_kit.models.text.chat import laid_out
from lorax_kit.models.text.tokenizer import Tokenizer

__all__ = [
    "BertClassifier",
    "BertConfig",
    "BertEncoder",
    "DistilbertConfig",
    "DistilbertEncoder",
    "Gpt2Config",
    "Gpt2Model",
    "LlamaConfig",
    "LlamaModel",
    "Loaded",
    "LstmClassifier",
    "LstmConfig",
    "MarianConfig",
    "MarianModel",
    "MissingPackageError",
    "Pretrained",
    "PretrainedLlama",
    "RobertaConfig",
    "RobertaEncoder",
    "Special",
    "T5Config",
    "T5Model",
    "Tokenizer",
    "answer",
    "classifier_names",
    "classifier_params",
    "classify",
    "decoder_names",
    "encoder_names",
    "fresh_head",
    "gpt2_names",
    "laid_out",
    "llama_names",
    "load_bert",
    "load_llama",
    "load_model",
    "locate",
    "marian_names",
    "save_model",
    "t5_names",
    "torch_names",
    "word_logits",
]
