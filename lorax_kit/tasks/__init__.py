"""What a task makes of a model's outputs: losses, sums and metrics; nothing here knows about low-rank adaptation."""

from lorax_kit.tasks.labels import macro_f1, micro_f1, number_sums, one_class_sums, pearson, several_classes_sums
from lorax_kit.tasks.language import Pairs, Told, row_log_likelihoods, token_sums, token_sums_in_pieces, told_batch
from lorax_kit.tasks.losses import correct, cross_entropies, cross_entropy, next_tokens
from lorax_kit.tasks.spans import Spans, best_spans, exact_match, span_losses, word_f1
from lorax_kit.tasks.texts import resampled_metrics, text_metrics

__all__ = [
    "Pairs",
    "Spans",
    "Told",
    "best_spans",
    "correct",
    "cross_entropies",
    "cross_entropy",
    "exact_match",
    "macro_f1",
    "micro_f1",
    "next_tokens",
    "number_sums",
    "one_class_sums",
    "pearson",
    "resampled_metrics",
    "row_log_likelihoods",
    "several_classes_sums",
    "span_losses",
    "text_metrics",
    "token_sums",
    "token_sums_in_pieces",
    "told_batch",
    "word_f1",
]
