"""What a model writes after the prompts of a test set, measured against what was to be written."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from lorax_kit.commands.adapters.generation import Author
from lorax_kit.errors import LoraxError
from lorax_kit.tasks import Pairs, Told, text_metrics

AT_ONCE, MOST_TOKENS = 16, 256


class Asked(NamedTuple):
    """The tokens of a prompt, of what is to be written after it, and whether the batch may hold only its beginning."""

    prompt: list[int]
    wanted: list[int]
    cut: bool


def written(
    author: Author, batches: Sequence[Any], *, max_new_tokens: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """Write, greedily, after the prompts of a problem's batches: of a conversation what the assistant says last.

    Rows that the batches hold only the beginning of are left out.

    Args:
      batches: of the problem on which the author is measured.
      max_new_tokens: of each text; None: half as many again as the longest reference, at most 256.

    Returns:
      {"metrics": as `lorax_kit.tasks.text_metrics`, "rows": [{"prompt", "wanted", "written"}, ...], "left_out"}.

    Raises:
      LoraxError: a task of which nothing is to be written, no whole row.
      ImportError: the `text` extra is not installed.
    """
    every = list(asked_of(batches))
    whole = sorted((one for one in every if not one.cut), key=lambda one: len(one.prompt))
    if not whole:
        raise LoraxError(f"none of {len(every)} test rows fits whole into its batch.\n  give a greater length")
    most = max_new_tokens or min(int(1.5 * max(len(one.wanted) for one in whole)) + 1, MOST_TOKENS)
    rows = []
    shown = tqdm(total=len(whole), desc="writing", disable=None if progress else True, file=sys.stderr)
    for at in range(0, len(whole), AT_ONCE):
        chunk = whole[at : at + AT_ONCE]
        prompts = [one.prompt for one in chunk]
        prompts += prompts[-1:] * (min(AT_ONCE, len(whole)) - len(chunk))  # the last batch needs no program of its own
        texts = author.writer(author.params, prompts, max_new_tokens=most)[: len(chunk)]
        for one, text in zip(chunk, texts, strict=True):
            prompt, wanted = map(author.loaded.tokenizer.decode, (one.prompt, one.wanted))
            rows.append({"prompt": prompt, "wanted": wanted.strip(), "written": text.text.strip()})
        shown.update(len(chunk))
    shown.close()
    metrics = text_metrics([row["written"] for row in rows], [row["wanted"] for row in rows])
    return {"metrics": metrics, "rows": rows, "left_out": len(every) - len(whole)}


def asked_of(batches: Iterable[Any]) -> Iterator[Asked]:
    """What each row of a problem's batches asks for.

    Raises:
      LoraxError: batches of a task of which nothing is to be written.
    """
    for batch in batches:
        if isinstance(batch, Told):
            yield from _of_told(*(np.asarray(x) for x in batch))
        elif isinstance(batch, Pairs):
            yield from _of_pairs(*(np.asarray(x) for x in batch))
        else:
            raise LoraxError(
                "nothing is to be written in this task: a text can be compared in the tasks 'chat' and 'translate'."
            )


def _of_told(ids: np.ndarray, mask: np.ndarray, told: np.ndarray) -> Iterator[Asked]:
    if mask.max() > 1:
        raise LoraxError("the task 'lm' continues texts: there is no prompt, and no reference to compare with.")
    for row, counts, marks in zip(ids, mask, told, strict=True):
        places = np.flatnonzero(marks)
        if not len(places):
            if counts.sum() > 1:  # its answer lies beyond the batch; a row that only fills it has one token
                yield Asked(row[counts != 0].tolist(), [], True)
            continue
        last = places[-1] + 1
        first = last - int(np.argmin(np.append(marks[:last][::-1], 0)))
        yield Asked(row[:first].tolist(), row[first:last].tolist(), last == len(row))


def _of_pairs(
    ids: np.ndarray, mask: np.ndarray, _: np.ndarray, label: np.ndarray, weight: np.ndarray
) -> Iterator[Asked]:
    for read, counts, told, weighs in zip(ids, mask, label, weight, strict=True):
        if weighs.any():
            cut = bool(counts.all() or weighs.all())
            yield Asked(read[counts != 0].tolist(), told[weighs != 0].tolist(), cut)
