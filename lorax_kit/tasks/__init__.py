"""Real data sets, batching and metrics; nothing here knows about low-rank adaptation."""

from lorax_kit.tasks.batching import Batch, Encoded, encoded, eval_batches, train_batches
from lorax_kit.tasks.metrics import correct, cross_entropies, cross_entropy, next_tokens
from lorax_kit.tasks.plays import Plays, Tokens, load_plays, spread_batches, window_batches, windows
from lorax_kit.tasks.sentiment import Reviews, Splits, load_reviews, split_reviews

__all__ = [
    "Batch",
    "Encoded",
    "Plays",
    "Reviews",
    "Splits",
    "Tokens",
    "correct",
    "cross_entropies",
    "cross_entropy",
    "encoded",
    "eval_batches",
    "load_plays",
    "load_reviews",
    "next_tokens",
    "split_reviews",
    "spread_batches",
    "train_batches",
    "window_batches",
    "windows",
]
