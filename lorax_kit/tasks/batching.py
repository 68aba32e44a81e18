"""Batches of token ids: an endless training stream of one shape, and bucketed batches for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """A padded batch.

    Attributes:
      ids: int32 (B, T), 0 where padded.
      mask: int32 (B, T), 1 where a token counts.
      label: int32 (B,).
      weight: fp32 (B,), 0 for rows that only fill the batch.
    """

    ids: np.ndarray
    mask: np.ndarray
    label: np.ndarray
    weight: np.ndarray


class Encoded(NamedTuple):
    """Token ids of each example, and labels int32 (n,)."""

    ids: tuple[tuple[int, ...], ...]
    labels: np.ndarray


def encoded(ids: Sequence[Sequence[int]], labels: np.ndarray, num_classes: int) -> Encoded:
    """Check and freeze encoded examples.

    Raises:
      ValueError: no examples, an example without tokens, a label out of range.
    """
    if len(ids) == 0:
        raise ValueError("the data set is empty: there are no examples.")
    if len(ids) != len(labels):
        raise ValueError(f"there are {len(ids)} examples and {len(labels)} labels.")
    for i, row in enumerate(ids):
        if len(row) == 0:
            raise ValueError(f"example {i} has length 0: it holds no tokens.")
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise ValueError(f"example {bad[0]} has label {labels[bad[0]]}, out of range for {num_classes} classes.")
    return Encoded(tuple(tuple(row) for row in ids), np.asarray(labels, np.int32))


def _batch(data: Encoded, index: np.ndarray, size: int, length: int) -> Batch:
    ids, mask = np.zeros((size, length), np.int32), np.zeros((size, length), np.int32)
    label, weight = np.zeros(size, np.int32), np.zeros(size, np.float32)
    mask[len(index) :, 0] = 1  # a filling row keeps one token, so that its mean is a number
    for row, i in enumerate(index):
        tokens = data.ids[i]
        if len(tokens) > length:
            tokens = (*tokens[: length - 1], tokens[-1])
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        label[row], weight[row] = data.labels[i], 1.0
    return Batch(ids, mask, label, weight)


def train_batches(data: Encoded, *, batch_size: int, length: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """Endless batches (batch_size, length), each epoch in a new order fixed by (seed, epoch).

    Longer examples keep their first tokens and their last. The remainder of an epoch that does not fill a batch is
    left out of it. `start` skips that many batches without building them.

    Raises:
      ValueError: fewer examples than a batch, a length below 2.
    """
    if length < 2 or batch_size < 1:
        raise ValueError(f"batches of {batch_size} x {length} tokens; need at least 1 x 2.")
    per_epoch = len(data.ids) // batch_size
    if per_epoch == 0:
        raise ValueError(f"{len(data.ids)} examples do not fill one batch of {batch_size}.")

    def stream() -> Iterator[Batch]:
        step = start
        while True:
            epoch, at = divmod(step, per_epoch)
            order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(data.ids))
            for k in range(at, per_epoch):
                yield _batch(data, order[k * batch_size : (k + 1) * batch_size], batch_size, length)
                step += 1

    return stream()


def eval_batches(data: Encoded, *, batch_size: int, buckets: Sequence[int]) -> list[Batch]:
    """Every example exactly once, sorted into length buckets; the last batch of a bucket is filled with weight 0.

    Examples longer than the longest bucket keep its length's first tokens and their last.

    Raises:
      ValueError: no buckets, or a bucket below 2.
    """
    lengths = sorted(set(buckets))
    if not lengths or lengths[0] < 2 or batch_size < 1:
        raise ValueError(f"buckets {list(buckets)} with batches of {batch_size}; need lengths of at least 2.")
    bucket = np.minimum(np.searchsorted(lengths, [len(row) for row in data.ids]), len(lengths) - 1)
    out = []
    for b, length in enumerate(lengths):
        members = np.flatnonzero(bucket == b)
        for i in range(0, len(members), batch_size):
            out.append(_batch(data, members[i : i + batch_size], batch_size, length))
    return out
