"""Prompts to texts: one compiled reading of the prompts, one compiled step, and a loop on the host around it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.core.paths import is_array
from lorax_kit.core.specs.setting import is_int, shown
from lorax_kit.errors import LoraxError
from lorax_kit.generate.decoder import Decoder
from lorax_kit.generate.pieces import Pieces
from lorax_kit.generate.sampling import Sampling, Scalars, chosen
from lorax_kit.models import Tokenizer

SLOTS = 32
"""Slots of a cache, and tokens of padded prompts, are multiples: few programs are compiled."""
CONTEXT = 8
"""Tokens of a prompt that a text is decoded after."""


class Written(NamedTuple):
    """What was written after a prompt.

    Attributes:
      text: without the prompt, special tokens, and the stop string that ended it.
      tokens: ids, the one that ended it among them.
      logprobs: of each token under the model, without penalty or temperature.
      finished: "eos", "stop" or "length".
      prompt: how many tokens were read.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: str
    prompt: int

    @property
    def logprob(self) -> float:
        """Of the whole text."""
        return float(sum(self.logprobs))


class _Running(NamedTuple):
    """What a step passes on: tokens (B,), their log-probabilities, how many were written, and what is donated."""

    token: Array
    logprob: Array
    written: Array
    cache: Any
    used: Array | None


@dataclass(frozen=True)
class Writer:
    """A decoder and its tokenizer, with compiled programs that calls of one shape share.

    Args:
      decoder: of params of any form; see `decoder_of`, `adapted`, `per_row_decoder`.
      tokenizer: texts to ids and back.

    Example:
      >>> from lorax_kit.models import load_model
      >>> from lorax_kit.generate import decoder_of
      >>> loaded = load_model("smollm2")  # doctest: +SKIP
      >>> writer = Writer(decoder_of(loaded), loaded.tokenizer)  # doctest: +SKIP
      >>> writer(loaded.params, ["The capital of France is"], max_new_tokens=2)[0].text  # doctest: +SKIP
      ' Paris.'
    """

    decoder: Decoder
    tokenizer: Tokenizer
    programs: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __call__(
        self,
        params: Any,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        samples: int = 1,
        seed: int = 0,
    ) -> list[Written]:
        """Write after each prompt.

        A row's text depends on its prompt, the settings, the seed and its number among the samples, not on what else is
        in the batch, up to rounding of the logits.

        Args:
          params: as the decoder takes them.
          prompts: texts, or token ids. Special tokens are added to texts as the tokenizer does.
          max_new_tokens: of each text.
          sampling: default: the most likely token.
          stop: strings before which a text ends.
          samples: texts a prompt, one after the other in the result.
          seed: of what is drawn.

        Raises:
          LoraxError: no prompts, an empty one, more tokens than the model has positions, values out of range.
        """
        rows = self._rows(prompts, max_new_tokens, samples, stop)
        texts = [self.text_after(row, stop) for row in rows]
        for tokens, logprobs in self._steps(params, rows, max_new_tokens, sampling or Sampling(), samples, seed):
            for text, token, logprob in zip(texts, tokens, logprobs, strict=True):
                if not text.finished:
                    text.add(int(token), float(logprob), self.decoder.eos)
            if all(text.finished for text in texts):
                break
        return [
            Written(text.whole(), tuple(text.tokens), tuple(text.logprobs), text.finished or "length", len(row))
            for text, row in zip(texts, rows, strict=True)
        ]

    def stream(
        self,
        params: Any,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[str]:
        """The text after one prompt, piece by piece: whole characters, and never a part of a stop string.

        Arguments and errors as of the call.
        """
        rows = self._rows([prompt], max_new_tokens, 1, stop)
        text = self.text_after(rows[0], stop)
        for (token,), (logprob,) in self._steps(params, rows, max_new_tokens, sampling or Sampling(), 1, seed):
            text.add(int(token), float(logprob), self.decoder.eos)
            if piece := text.piece():
                yield piece
            if text.finished:
                break
        if rest := text.rest():
            yield rest

    def text_after(self, row: Sequence[int], stop: Sequence[str]) -> Pieces:
        """A text without tokens yet, after a prompt's."""
        before = () if self.decoder.written_alone else tuple(row[-CONTEXT:])
        return Pieces(self.tokenizer, tuple(stop), before)

    def _rows(self, prompts: Sequence[Any], new: int, samples: int, stop: Sequence[str]) -> list[list[int]]:
        for name, x in (("max_new_tokens", new), ("samples", samples)):
            if not is_int(x) or x < 1:
                raise LoraxError(f"{name} is {shown(x)}; it must be an integer of at least 1.")
        if isinstance(prompts, str) or not prompts:
            raise LoraxError("prompts must be a list of texts, or of lists of token ids, and not empty.")
        if isinstance(stop, str) or not all(isinstance(x, str) and x for x in stop):
            raise LoraxError(f"stop is {shown(stop)}; it must be a list of strings, none of them empty.")
        ids = [self._ids(i, prompt) for i, prompt in enumerate(prompts)]
        for i, row in enumerate(ids):
            most, whole = self.decoder.positions, len(row) + new
            if most is not None and (max(len(row), new) if self.decoder.written_alone else whole) > most:
                raise LoraxError(
                    f"prompt {i} has {len(row)} tokens, and {new} are to be written: the model has {most} positions."
                )
        return [row for row in ids for _ in range(samples)]

    def _ids(self, number: int, prompt: Any) -> list[int]:
        """The tokens of one prompt."""
        if isinstance(prompt, str):
            row = self.tokenizer.encode([prompt], 2**31)[0]
        elif is_array(prompt) or isinstance(prompt, Sequence):
            row = [x.item() if is_array(x) and not x.ndim else x for x in prompt]
        else:
            raise LoraxError(f"prompt {number} is {shown(prompt)}; it must be a text, or a list of token ids.")
        if not row:
            raise LoraxError(f"prompt {number} is empty: there is nothing to go on from.")
        size = self.decoder.vocabulary
        for x in row:
            if not is_int(x) or x < 0 or (size is not None and x >= size):
                most = "" if size is None else f" below the model's {size:,} tokens"
                raise LoraxError(f"prompt {number} holds {shown(x)}; the id of a token is an integer from 0{most}.")
        return row

    def _steps(
        self, params: Any, rows: list[list[int]], new: int, sampling: Sampling, samples: int, seed: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens and log-probabilities of all rows, a step at a time; the next step runs while one is looked at."""
        ids, mask = self._padded(rows, new)
        held = 0 if self.decoder.written_alone else ids.shape[1]
        slots = min(_multiple(held + new), self.decoder.positions or 2**31)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
            jax.random.key(seed),
            jnp.asarray([crc32(np.asarray(row, np.int32).tobytes()) for row in rows], jnp.uint32),
        )
        keys = jax.vmap(jax.random.fold_in)(keys, jnp.arange(len(rows), dtype=jnp.uint32) % samples)
        begin, step = self._compiled(sampling.form, slots)
        scalars = sampling.scalars()
        now = begin(params, ids, mask, keys, scalars)
        for left in reversed(range(new)):
            given = now.token, now.logprob
            if left:
                now = step(params, now.token, now.written, (now.cache, now.used), keys, scalars)
            yield tuple(np.asarray(x) for x in given)  # type: ignore[misc]

    def _padded(self, rows: list[list[int]], new: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompts with padding on the left."""
        longest = max(len(row) for row in rows)
        most = self.decoder.positions or 2**31
        length = max(min(_multiple(longest), most - (0 if self.decoder.written_alone else new)), longest)
        ids = np.full((len(rows), length), self.decoder.pad, np.int32)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
        return ids, mask

    def _compiled(self, form: tuple[bool, bool, bool], slots: int) -> tuple[Any, Any]:
        if (form, slots) not in self.programs:
            decoder = self.decoder

            def took(logits: Array, count: Array, cache: Any, used: Any, keys: Any, scalars: Scalars) -> _Running:
                own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, count) if form[0] else keys
                token, logprob = chosen(logits, scalars, own, used, form)
                used = None if used is None else used.at[jnp.arange(len(token)), token].set(True)
                return _Running(token, logprob, count + 1, cache, used)

            def begin(params: Any, ids: Array, mask: Array, keys: Any, scalars: Scalars) -> _Running:
                logits, cache = decoder.begin(params, ids, mask, slots)
                used = None
                if form[2]:
                    rows = jnp.arange(len(ids))[:, None]
                    text, there = ids, mask != 0
                    if decoder.start is not None:  # as in transformers: what an encoder reads is no part of the text
                        text, there = jnp.full_like(rows, decoder.start), jnp.ones_like(rows, bool)
                    used = jnp.zeros(logits.shape, bool).at[rows, text].max(there)
                return took(logits, jnp.int32(0), cache, used, keys, scalars)

            def step(params: Any, token: Array, count: Array, held: Any, keys: Any, scalars: Scalars) -> _Running:
                logits, cache = decoder.step(params, token[:, None], jnp.ones((len(token), 1), jnp.int32), held[0])
                return took(logits, count, cache, held[1], keys, scalars)

            self.programs[form, slots] = jax.jit(begin), jax.jit(step, donate_argnums=(3,))
        programs: tuple[Any, Any] = self.programs[form, slots]
        return programs


def _multiple(x: int) -> int:
    return -(-x // SLOTS) * SLOTS


def tokens_per_second(writer: Writer, params: Any, prompts: Sequence[Any], new: int) -> float:
    """How many tokens all rows together are written in a second, prompts included; programs are compiled before."""
    writer(params, prompts, max_new_tokens=new)
    began = time.perf_counter()
    written = writer(params, prompts, max_new_tokens=new)
    return sum(len(one.tokens) for one in written) / (time.perf_counter() - began)
