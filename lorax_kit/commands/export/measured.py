"""What an exported model that writes is worth: its tokens and perplexity against JAX's, and how long a token takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.benchmarks.timing import alternate, ratio
from lorax_kit.commands.adapters.generation import Author
from lorax_kit.errors import ExportError
from lorax_kit.generate.exported import Runner
from lorax_kit.tasks import Pairs
from lorax_kit.transform import compressed

MOST, LONGEST, PROMPT = 20, 96, 8
"""Samples, tokens of each, and tokens of a prompt that is the beginning of a text."""
SENTENCES = (
    "The capital of France is Paris, a city on the river Seine that is known for its museums and its food.",
    "Water boils at one hundred degrees at sea level, and at a lower temperature on a high mountain.",
    "She opened the letter slowly, read it twice, and put it back into the drawer without a word.",
    "The train leaves at half past seven, so we should be at the station a little earlier than that.",
    "A triangle with three equal sides also has three equal angles, each of them sixty degrees.",
    "When the rain stopped the children ran outside to play in the garden behind the old house.",
    "Plants take in carbon dioxide and water, and with the light of the sun they make sugar and oxygen.",
    "The committee will meet again in the spring to decide how the money should be spent.",
    "He had never seen the sea before, and for a long time he stood on the beach and said nothing.",
    "To make bread you need flour, water, salt and yeast, and above all you need some patience.",
    "The moon goes around the Earth once in about twenty-seven days, and always shows us the same side.",
    "My grandmother used to say that the best time to plant a tree was twenty years ago.",
    "The library is open from nine in the morning until eight in the evening, except on Sundays.",
    "A good program does one thing well, and can be used together with other programs.",
    "The old bridge was closed last winter because the stones had begun to move.",
    "In the middle of the night a loud noise woke everyone who was sleeping in the hotel.",
    "The heart pumps blood through the body, carrying oxygen to every part of it.",
    "If you add two odd numbers together, the result is always an even number.",
    "The farmer sold his apples at the market and bought a new pair of boots with the money.",
    "Many birds fly south in the autumn and come back when the days grow longer again.",
)


class Sample(NamedTuple):
    """A text to measure on.

    Attributes:
      prompt: tokens that are read.
      target: those that are told after them.
      weight: of each of the target, 1 where it counts.
    """

    prompt: list[int]
    target: list[int]
    weight: list[int]


def samples_of(author: Author, source: Iterable[Any], longest: int | None = None) -> list[Sample]:
    """Up to twenty samples of texts, or of the batches of a task: what is told counts, what comes before is the prompt.

    Raises:
      ExportError: there are none.
    """
    out: list[Sample] = []
    for item in source:
        if isinstance(item, str):
            ids = author.loaded.tokenizer.encode([item], 2**31)[0]
            out.append(_sample(ids, [1] * len(ids), author.loaded.kind))
        elif isinstance(item, Pairs):
            rows = zip(item.ids, item.mask, item.label, item.weight, strict=True)
            for ids, mask, label, weight in rows:
                target = [int(i) for i in label[np.asarray(weight) > 0]][:LONGEST]
                out.append(Sample([int(i) for i in ids[np.asarray(mask) > 0]], target, [1] * len(target)))
        else:
            told = item.told if hasattr(item, "told") else item.mask
            for ids, mask, marks in zip(item.ids, item.mask, told, strict=True):
                kept = np.asarray(mask) > 0
                out.append(_sample([int(i) for i in ids[kept]], [int(i) for i in marks[kept]], "decoder"))
    two, most = author.loaded.kind == "encoder-decoder", longest or 2**31
    lengths = [max(len(s.prompt), len(s.target)) if two else len(s.prompt) + len(s.target) for s in out]
    good = [s for s, n in zip(out, lengths, strict=True) if s.prompt and any(s.weight) and n <= most]
    if not good and (fits := [n for s, n in zip(out, lengths, strict=True) if s.prompt and any(s.weight)]):
        raise ExportError(
            f"no text is short enough to measure on: the shortest of {len(fits)} has {min(fits)} tokens, and what is "
            f"exported takes {most}.\n  give shorter texts, or a greater length"
        )
    if not good:
        raise ExportError("no text is long enough to measure on: each needs a token to read and one to tell.")
    return good[:MOST]


def _sample(ids: list[int], told: list[int], kind: str) -> Sample:
    """Of one text: an encoder-decoder reads it and tells it again."""
    if kind == "encoder-decoder":
        return Sample(ids, ids[:LONGEST], told[:LONGEST])
    first = next((i for i, mark in enumerate(told) if mark), len(told))
    first = first if first >= PROMPT else min(PROMPT, max(len(ids) // 2, 1))
    return Sample(ids[:first], ids[first:][:LONGEST], told[first:][:LONGEST])


def measured(
    author: Author, runner: Runner, samples: Sequence[Sample], *, longest: int | None, new: int, rounds: int
) -> dict[str, Any]:
    """Tokens, perplexity and latency of exported programs beside JAX's.

    Returns:
      `prompts, tokens` (told); `tokens_equal` (share of prompts after which all `new` tokens are JAX's);
      `perplexity_jax, perplexity, perplexity_ratio`; `max_difference` (of a token's log-probability);
      `latency_jax_ms, latency_ms, latency_ratio` (of one token after a prompt of 32).
    """
    most = longest or 2**31
    alone = author.loaded.kind == "encoder-decoder"
    new = max(1, min(new, *(most - (0 if alone else len(s.prompt)) for s in samples)))
    ours = author.writer(author.params, [s.prompt for s in samples], max_new_tokens=new)
    ids, mask = _padded([s.prompt for s in samples], author.loaded.special.pad or 0)
    theirs = runner.greedy(ids, mask, new)
    same = [list(one.tokens) == [int(i) for i in row[: len(one.tokens)]] for one, row in zip(ours, theirs, strict=True)]
    weight = np.concatenate([np.asarray(s.weight, bool) for s in samples])
    jaxs, exported = (
        np.concatenate(x)[weight] for x in (_in_jax(author, samples), _exported(runner, samples, ids, mask))
    )
    perplexity_jax, perplexity = (math.exp(-float(np.mean(x, dtype=np.float64))) for x in (jaxs, exported))
    return {
        "prompts": len(samples),
        "tokens": int(weight.sum()),
        "tokens_equal": float(np.mean(same)),
        "perplexity_jax": perplexity_jax,
        "perplexity": perplexity,
        "perplexity_ratio": perplexity / perplexity_jax,
        "max_difference": float(np.abs(jaxs - exported).max()),
        **_latency(author, runner, samples[0].prompt, longest, rounds),
    }


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with padding on the left."""
    length = max(map(len, rows))
    ids = np.full((len(rows), length), pad, np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    return ids, mask


def _in_jax(author: Author, samples: Sequence[Sample]) -> list[np.ndarray]:
    """Log-probabilities of each target, from the whole text at once."""
    loaded, two = author.loaded, author.loaded.kind == "encoder-decoder"
    read = max(len(s.prompt) for s in samples) if two else 0
    told = max(len(s.target) + (0 if two else len(s.prompt)) for s in samples)

    @jax.jit
    @compressed
    def logp(params: Any, *arrays: Array) -> Array:
        logits: Any = loaded.model.apply({"params": params}, *arrays)
        return jax.nn.log_softmax(logits, axis=-1)

    def filled(row: Sequence[int], length: int) -> tuple[Array, Array]:
        ids = jnp.asarray([[*row, *[0] * (length - len(row))]], jnp.int32)
        return ids, (jnp.arange(length) < len(row)).astype(jnp.int32)[None]

    out = []
    for s in samples:
        text = [loaded.special.start, *s.target[:-1]] if two else [*s.prompt, *s.target]
        logps = logp(author.params, *(filled(s.prompt, read) if two else ()), *filled(text, told))  # type: ignore[arg-type]
        first = 0 if two else len(s.prompt) - 1
        out.append(np.asarray(logps[0, np.arange(first, first + len(s.target)), np.asarray(s.target)]))
    return out


def _exported(runner: Runner, samples: Sequence[Sample], ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """Log-probabilities of each target, token after token."""
    longest = max(len(s.target) for s in samples)
    target = np.zeros((len(samples), longest), np.int32)
    for row, s in zip(target, samples, strict=True):
        row[: len(s.target)] = s.target
    logits, held = runner.begin(ids, mask, longest)
    logps = [_told(logits, target[:, 0])]
    for i in range(1, longest):
        logits, held = runner.step(target[:, i - 1 : i], np.ones((len(samples), 1), np.int32), held)
        logps.append(_told(logits, target[:, i]))
    whole = np.stack(logps, axis=1)
    return [row[: len(s.target)] for row, s in zip(whole, samples, strict=True)]


def _told(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Log-probability of one token a row."""
    high = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - high).sum(-1)) + high[:, 0]
    return logits[np.arange(len(logits)), tokens] - total


def _latency(author: Author, runner: Runner, prompt: Sequence[int], longest: int | None, rounds: int) -> dict[str, Any]:
    """Milliseconds of one token after a prompt of up to 32, in JAX and exported, a row alone."""
    if not rounds:
        return dict.fromkeys(("latency_jax_ms", "latency_ms", "latency_ratio"))
    prompt = (list(prompt) * 32)[: min(32, (longest or 64) // 2)]
    ids, mask = _padded([prompt], 0)
    decoder, token = author.writer.decoder, (ids[:, :1], np.ones((1, 1), np.int32))
    slots = min(-(-(len(prompt) + 1) // 32) * 32, longest or 2**31)
    _, cache = jax.jit(decoder.begin, static_argnums=3)(author.params, ids, mask, slots)
    step = jax.jit(decoder.step)
    _, held = runner.begin(ids, mask, 1)
    runs: Mapping[str, Any] = {
        "jax": lambda: jax.block_until_ready(step(author.params, *token, cache)),
        "exported": lambda: runner.step(*token, held),
    }
    times = alternate(runs, range(rounds))
    return {
        "latency_jax_ms": median(times["jax"]),
        "latency_ms": median(times["exported"]),
        "latency_ratio": ratio(times, "exported", "jax").median,
    }
