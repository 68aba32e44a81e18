"""Data as batches: files, packaged data sets, splits and streams; nothing here knows models."""

from lorax_kit.data.batching import Batch, Encoded, encoded, eval_batches, train_batches
from lorax_kit.data.plays import Plays, Tokens, load_plays, spread_batches, window_batches, windows
from lorax_kit.data.reviews import Reviews, Splits, load_reviews, split_reviews

__all__ = [
    "Batch",
    "Encoded",
    "Plays",
    "Reviews",
    "Splits",
    "Tokens",
    "encoded",
    "eval_batches",
    "load_plays",
    "load_reviews",
    "split_reviews",
    "spread_batches",
    "train_batches",
    "window_batches",
    "windows",
]
