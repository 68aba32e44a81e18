"""Data as batches: files, packaged data sets, splits and streams; nothing here knows models."""

from lorax_kit.data.batching import (
    Batch,
    Encoded,
    encoded,
    eval_batches,
    evaluation_batches,
    padded,
    row_stream,
    train_batches,
    training_stream,
)
from lorax_kit.data.examples import Encode, Examples
from lorax_kit.data.packing import Piece, pack, packed
from lorax_kit.data.plays import Plays, Tokens, load_plays, spread_batches, window_batches, windows
from lorax_kit.data.ragged import Ragged
from lorax_kit.data.reviews import Reviews, Splits, load_reviews, split_reviews
from lorax_kit.data.split import Parts, key_of, split_rows
from lorax_kit.data.table import Row, read_rows

__all__ = [
    "Batch",
    "Encode",
    "Encoded",
    "Examples",
    "Parts",
    "Piece",
    "Plays",
    "Ragged",
    "Reviews",
    "Row",
    "Splits",
    "Tokens",
    "encoded",
    "eval_batches",
    "evaluation_batches",
    "key_of",
    "load_plays",
    "load_reviews",
    "pack",
    "packed",
    "padded",
    "read_rows",
    "row_stream",
    "split_reviews",
    "split_rows",
    "spread_batches",
    "train_batches",
    "training_stream",
    "window_batches",
    "windows",
]
