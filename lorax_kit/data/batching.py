"""Batches of token ids: an endless training stream of one shape or a few, and bucketed batches for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lorax_kit.errors import DataError


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

    ids: Sequence[Sequence[int]]
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


Make = Callable[[np.ndarray, int, int], Any]
"""(places of examples, rows of the batch, its length) -> a batch; rows beyond the examples only fill it."""


def padded(rows: Sequence[Sequence[int]], size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and their mask, int32 (size, length): 0 where padded, or where a row only fills the batch.

    A longer row keeps its first tokens and its last, which ends the text of an encoder.
    """
    ids, mask = np.zeros((size, length), np.int32), np.zeros((size, length), np.int32)
    mask[len(rows) :, 0] = 1  # a filling row keeps one token, so that its mean is a number
    for i, row in enumerate(rows):
        tokens = row if len(row) <= length else [*row[: length - 1], row[-1]]
        ids[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = 1
    return ids, mask


def _batch(data: Encoded, index: np.ndarray, size: int, length: int) -> Batch:
    ids, mask = padded([data.ids[i] for i in index], size, length)
    label, weight = np.zeros(size, np.int32), np.zeros(size, np.float32)
    label[: len(index)], weight[: len(index)] = data.labels[index], 1.0
    return Batch(ids, mask, label, weight)


def train_batches(
    data: Encoded, *, batch_size: int, length: int | Sequence[int], seed: int, start: int = 0
) -> Iterator[Batch]:
    """`training_stream` of classified texts."""
    sizes = [len(row) for row in data.ids]
    return training_stream(sizes, partial(_batch, data), batch_size=batch_size, length=length, seed=seed, start=start)


def training_stream(
    sizes: Sequence[int] | np.ndarray,
    make: Make,
    *,
    batch_size: int,
    length: int | Sequence[int],
    seed: int,
    start: int = 0,
) -> Iterator[Any]:
    """Endless batches, each epoch in a new order fixed by (seed, epoch).

    Args:
      sizes: tokens of each example.
      make: of the places of a batch's examples.

    With one length all batches are (batch_size, length). With several, a batch holds examples of similar length and
    is padded to the next of them; what does not fill a batch moves to the next length. Which shape comes when depends
    on the epoch alone, so that the streams of several seeds can be stacked, and the first batch is of the greatest.
    Longer examples keep their first tokens and their last. The remainder of an epoch that does not fill a batch is
    left out of it. `start` skips that many batches without building them.

    Raises:
      DataError: fewer examples than a batch.
      ValueError: a length below 2.
    """
    lengths = [length] if isinstance(length, int) else sorted(set(length))
    if not lengths or lengths[0] < 2 or batch_size < 1:
        raise ValueError(f"batches of {batch_size} x {length} tokens; need at least 1 x 2.")
    if len(sizes) < batch_size:
        raise DataError(_too_few(len(sizes), "examples", batch_size))
    members = _buckets(sizes, lengths)
    counts = _batches_per_bucket([len(m) for m in members], batch_size)
    shapes = np.repeat(np.arange(len(lengths)), counts)
    per_epoch = len(shapes)

    def epoch_of(epoch: int) -> list[tuple[int, np.ndarray]]:
        """(length, examples) of each batch of an epoch."""
        rng = np.random.Generator(np.random.PCG64([seed, epoch]))
        pools, left = [], np.zeros(0, int)
        for own, count in zip(members, counts, strict=True):
            order = np.concatenate([left, own])[rng.permutation(len(left) + len(own))]
            pools.append(order[: count * batch_size].reshape(count, batch_size))
            left = order[count * batch_size :]
        order = np.random.Generator(np.random.PCG64(epoch)).permutation(shapes[:-1])
        turn = [shapes[-1], *order]
        ready = [iter(pool) for pool in pools]
        return [(lengths[b], next(ready[b])) for b in turn]

    def stream() -> Iterator[Any]:
        step = start
        while True:
            epoch, at = divmod(step, per_epoch)
            for size, index in epoch_of(epoch)[at:]:
                yield make(index, batch_size, size)
                step += 1

    return stream()


def _buckets(sizes: Sequence[int] | np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    """For each of the ascending `lengths`, the examples that fit it and no shorter one; the last takes longer ones."""
    bucket = np.minimum(np.searchsorted(lengths, sizes), len(lengths) - 1)
    return [np.flatnonzero(bucket == b) for b in range(len(lengths))]


def _batches_per_bucket(sizes: Sequence[int], batch_size: int) -> list[int]:
    """Full batches of each bucket, when what does not fill one moves to the next."""
    counts, left = [], 0
    for size in sizes:
        count, left = divmod(left + size, batch_size)
        counts.append(count)
    return counts


def eval_batches(data: Encoded, *, batch_size: int, buckets: Sequence[int]) -> list[Batch]:
    """`evaluation_batches` of classified texts."""
    return evaluation_batches(
        [len(row) for row in data.ids], partial(_batch, data), batch_size=batch_size, buckets=buckets
    )


def evaluation_batches(
    sizes: Sequence[int] | np.ndarray, make: Make, *, batch_size: int, buckets: Sequence[int]
) -> list[Any]:
    """Every example exactly once, sorted into length buckets; the last batch of a bucket is filled with weight 0.

    Examples longer than the longest bucket keep its length's first tokens and their last.

    Raises:
      ValueError: no buckets, or a bucket below 2.
    """
    lengths = sorted(set(buckets))
    if not lengths or lengths[0] < 2 or batch_size < 1:
        raise ValueError(f"buckets {list(buckets)} with batches of {batch_size}; need lengths of at least 2.")
    out = []
    for length, members in zip(lengths, _buckets(sizes, lengths), strict=True):
        for i in range(0, len(members), batch_size):
            out.append(make(members[i : i + batch_size], batch_size, length))
    return out


def row_stream(rows: int, *, batch_size: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """Endless places of the rows of each batch from batch `start`, each epoch in a new order fixed by (seed, epoch).

    Raises:
      DataError: fewer rows than a batch.
    """
    if not 1 <= batch_size <= rows:
        raise DataError(_too_few(rows, "rows", batch_size))

    def stream() -> Iterator[np.ndarray]:
        per_epoch = rows // batch_size
        epoch, skip = divmod(start, per_epoch)
        while True:
            order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)
            yield from order[skip * batch_size : per_epoch * batch_size].reshape(-1, batch_size)
            epoch, skip = epoch + 1, 0

    return stream()


def _too_few(count: int, what: str, batch_size: int) -> str:
    return f"{count} {what} do not fill one batch of {batch_size}.\n  give more of them, or a smaller batch_size"
