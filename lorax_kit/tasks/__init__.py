"""What a task makes of a model's outputs: losses, sums and metrics; nothing here knows about low-rank adaptation."""

from lorax_kit.tasks.labels import macro_f1, micro_f1, number_sums, one_class_sums, pearson, several_classes_sums
from lorax_kit.tasks.language import Told, row_log_likelihoods, token_sums, told_batch
from lorax_kit.tasks.losses import correct, cross_entropies, cross_entropy, next_tokens

__all__ = [
    "Told",
    "correct",
    "cross_entropies",
    "cross_entropy",
    "macro_f1",
    "micro_f1",
    "next_tokens",
    "number_sums",
    "one_class_sums",
    "pearson",
    "row_log_likelihoods",
    "several_classes_sums",
    "token_sums",
    "told_batch",
]
