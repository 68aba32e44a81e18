"""Texts that were written against those that were wanted: BLEU, chrF, exact match and F1 of words.

The only file that uses sacrebleu (the `text` extra).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lorax_kit.errors import LoraxError
from lorax_kit.extras import need
from lorax_kit.tasks.spans import exact_match, word_f1


def text_metrics(written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Measure texts against references, one for each.

    Returns:
      {"bleu", "chrf"} from 0 to 100, of the whole corpus (Papineni et al., 2002; Popović, 2015; sacrebleu's defaults),
      {"exact_match", "f1"} from 0 to 1, means over the texts, as of extractive answers (Rajpurkar et al., 2016).

    Raises:
      LoraxError: no texts, or another number of references.
      ImportError: the extra is not installed.

    Example:
      >>> metrics = text_metrics(["the cat sat down", "no"], ["the cat sat down", "yes"])
      >>> metrics["exact_match"], round(metrics["chrf"]) > 50
      (0.5, True)
    """
    _check(written, wanted)
    bleu, chrf = _sacrebleu()
    return {
        "bleu": bleu(list(written), [list(wanted)]).score,
        "chrf": chrf(list(written), [list(wanted)]).score,
        "exact_match": float(np.mean([exact_match(a, b) for a, b in zip(written, wanted, strict=True)])),
        "f1": float(np.mean([word_f1(a, b) for a, b in zip(written, wanted, strict=True)])),
    }


def resampled_metrics(
    written: Sequence[Sequence[str]], wanted: Sequence[str], *, times: int = 200, seed: int = 0
) -> list[list[dict[str, float]]]:
    """The metrics of several systems over the same resamples of the texts, for paired bootstrap intervals.

    Args:
      written: the texts of each system.
      wanted: the references, the same for all.

    Returns:
      For each system, the metrics of each resample; differences of two systems are paired by their place (Koehn, 2004).

    Raises:
      LoraxError, ImportError: as `text_metrics`.
    """
    for texts in written:
        _check(texts, wanted)
    drawn = np.random.default_rng(seed).integers(len(wanted), size=(times, len(wanted)))
    references = [[wanted[i] for i in index] for index in drawn]
    return [
        [text_metrics([texts[i] for i in index], some) for index, some in zip(drawn, references, strict=True)]
        for texts in written
    ]


def _check(written: Sequence[str], wanted: Sequence[str]) -> None:
    if isinstance(written, str) or len(written) != len(wanted) or not written:
        raise LoraxError(f"{len(written)} texts and {len(wanted)} references: give one for each, and at least one.")


def _sacrebleu() -> tuple[Callable[..., Any], Callable[..., Any]]:
    need("text", "sacrebleu")
    from sacrebleu import corpus_bleu, corpus_chrf

    return corpus_bleu, corpus_chrf
