"""Real data sets, batching and metrics; nothing here knows about low-rank adaptation."""

from lorax_kit.tasks.batching import Batch, Encoded, encoded, eval_batches, train_batches
from lorax_kit.tasks.metrics import correct, cross_entropies, cross_entropy
from lorax_kit.tasks.sentiment import Reviews, Splits, load_reviews, split_reviews

__all__ = [
    "Batch",
    "Encoded",
    "Reviews",
    "Splits",
    "correct",
    "cross_entropies",
    "cross_entropy",
    "encoded",
    "eval_batches",
    "load_reviews",
    "split_reviews",
    "train_batches",
]
