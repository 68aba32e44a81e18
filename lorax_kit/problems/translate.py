"""Pairs of texts, the second written from the first: translation, summaries, any rewriting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.core.specs.setting import shown
from lorax_kit.data import Examples, Row, key_of, padded
from lorax_kit.errors import StudyError
from lorax_kit.models import Loaded
from lorax_kit.problem import Problem
from lorax_kit.problems.chat import template_of, told_problem
from lorax_kit.problems.classify import text_of
from lorax_kit.problems.parts.layers import fewer_layers
from lorax_kit.problems.parts.rows import TextSettings, batches_of, facts_of, length_of, load, read_parts
from lorax_kit.tasks import Pairs, correct, cross_entropies
from lorax_kit.training import Weighted
from lorax_kit.transform import compressed

_SOURCE = "re:encoder/.*|decoder/.*/cross/(key|value)/.*"
_TARGET = "re:decoder/(?!.*/cross/(key|value)/).*"
"""What reads the tokens of the first text of a pair, and of the second."""


@dataclass(frozen=True, kw_only=True)
class Translate(TextSettings):
    """Pairs of texts for an encoder-decoder, or for a decoder that is asked; measured by perplexity of the second.

    Args:
      source, target: columns.
      prompt: what the model is given, with {source} in it: of a decoder the user's message. T5 was trained on prompts
        such as "translate English to German: {source}", Marian on the text alone.
      system, template: of a decoder's conversation, as in `Chat`.
    """

    writes: ClassVar[bool] = True

    model: str = "smollm2"
    source: str = "source"
    target: str = "target"
    prompt: str = "{source}"
    system: str | None = None
    template: str | None = None
    batch_size: int = 8

    roles: ClassVar[tuple[str, ...]] = ("source", "target")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.prompt, str) or "{source}" not in self.prompt:
            raise StudyError(f"problem prompt is {shown(self.prompt)}; it must be text with {{source}} in it.")
        for name in ("system", "template"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise StudyError(f"problem {name} is {shown(getattr(self, name))}; it must be a string.")

    def build(self) -> Problem:
        """Load weights and data.

        Raises:
          StudyError: the model is an encoder, a decoder without a chat template, or an encoder-decoder with one.
          DataError: as `read_parts`.
        """
        loaded = load(self, "translate")
        if loaded.kind == "encoder":
            raise StudyError(f"the task 'translate' needs a model that writes; {self.model!r} is an encoder.")
        if loaded.kind == "encoder-decoder":
            return self._from_encoder(loaded)

        def conversation(row: Row) -> list[dict[str, str]]:
            said = [("user", self.asked(row)), ("assistant", text_of(row, "target"))]
            begins = [] if self.system is None else [("system", self.system)]
            return [{"role": role, "content": text} for role, text in (*begins, *said)]

        return told_problem(self, "translate", loaded, conversation, template_of(loaded, self.template))

    def asked(self, row: Row) -> str:
        """What the model is given of a row."""
        return self.prompt.replace("{source}", text_of(row, "source"))

    def _from_encoder(self, loaded: Loaded) -> Problem:
        """Of an encoder-decoder: teacher forcing, the target after its start token."""
        tokenizer, start = loaded.tokenizer, loaded.special.start
        if self.system is not None or self.template is not None:
            raise StudyError(f"{self.model!r} is an encoder-decoder: a system and a template are of a conversation.")
        if start is None:
            raise StudyError(f"{self.model!r} does not say which token its texts begin with: decoder_start_token_id.")

        def encode(rows: Sequence[Row]) -> dict[str, Any]:
            asked = [self.asked(row) for row in rows]
            told = [text_of(row, "target") for row in rows]
            keys = [key_of(*pair) for pair in zip(asked, told, strict=True)]
            return {"ids": tokenizer.encode(asked, 2**31), "target": tokenizer.encode(told, 2**31), "key": keys}

        data = read_parts(self, encode)
        length = length_of(self, data.train["ids"].lengths, loaded.positions)
        longest = length_of(self, data.train["target"].lengths, loaded.positions)

        def make(part: Examples, index: np.ndarray, size: int, length: int) -> Pairs:
            ids, mask = padded([part["ids"][i] for i in index], size, length)
            label, weight = padded([part["target"][i][:longest] for i in index], size, longest)
            weight[len(index) :] = 0
            given = np.concatenate([np.full((size, 1), start, np.int32), label[:, :-1]], axis=1)
            return Pairs(ids, mask, given, label, weight)

        layers = _layers(loaded)
        return Problem(
            name="translate",
            params=lambda key: loaded.params,
            apply=_applying(loaded.model),
            loss=lambda logits, batch: _sums(logits, batch)["loss"],
            score=_sums,
            metrics=["perplexity", "accuracy"],
            targets=("{encoder,decoder}/layer_*/**/kernel",),
            layers=tuple(f"{part}/layer_{i}/**" for part, n in layers.items() for i in range(n)),
            places=lambda batch: batch.weight.astype(jnp.float32),
            counts={
                _SOURCE: lambda batch: batch.mask * (batch.weight.max(axis=1, keepdims=True) > 0),
                _TARGET: lambda batch: batch.weight,
            },
            student=partial(_student, loaded),
            **batches_of(data, make, self, length),
            facts=facts_of(
                self,
                data,
                length,
                "translate",
                {
                    "target_length": longest,
                    "cut": sum(
                        int(((part["ids"].lengths > length) | (part["target"].lengths > longest)).sum())
                        for part in data[:3]
                    ),
                },
            ),
        )


def _applying(model: Any) -> Any:
    def apply(params: Any, batch: Pairs) -> Any:
        return model.apply({"params": params}, batch.ids, batch.mask, batch.given, jnp.ones_like(batch.given))

    return compressed(apply)  # params may be quantised as they were loaded


def _layers(loaded: Loaded) -> dict[str, int]:
    return {"encoder": loaded.config.num_hidden_layers, "decoder": loaded.config.num_decoder_layers}


def _student(loaded: Loaded, count: int, params: Any) -> tuple[Any, Any]:
    """`Problem.student`: as large a share of the encoder's layers as of the decoder's, and at least one of each."""
    layers = _layers(loaded)
    read = max(round(count * layers["encoder"] / sum(layers.values())), 1)
    written = max(count - read, 1)
    smaller = replace(loaded.config, num_hidden_layers=read, num_decoder_layers=written)
    fewer = {part: fewer_layers(params[part], n) for part, n in (("encoder", read), ("decoder", written))}
    return _applying(type(loaded.model)(smaller)), {**params, **fewer}


def _sums(logits: Array, batch: Pairs) -> dict[str, Weighted]:
    """`Problem.score`: over the tokens of the second text."""
    weight = batch.weight.astype(jnp.float32)
    losses = jnp.sum(cross_entropies(logits, batch.label) * weight)
    right, count = correct(logits, batch.label, weight), jnp.sum(weight)
    return {"loss": Weighted(losses, count), "correct": Weighted(right, count)}
