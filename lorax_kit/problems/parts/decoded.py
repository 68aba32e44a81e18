"""A decoder that tells the tokens of a batch: what language modelling, chat and translation share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jax import Array

from lorax_kit.models.heads import word_logits
from lorax_kit.problem import Problem
from lorax_kit.problems.parts.layers import fewer_layers
from lorax_kit.tasks import Told, next_tokens, token_sums, token_sums_in_pieces
from lorax_kit.training import Weighted
from lorax_kit.transform import compressed

if TYPE_CHECKING:
    from lorax_kit.models import Loaded


def decoder_problem(
    name: str,
    loaded: Loaded,
    *,
    train: Callable[[int, int], Iterator[Told]],
    val: Sequence[Told],
    test: Sequence[Told],
    facts: Mapping[str, Any],
) -> Problem:
    """The problem of telling tokens, measured by perplexity and by how many are told right."""

    def named(losses: Array, right: Array, count: Array) -> dict[str, Weighted]:
        return {"loss": Weighted(losses, count), "correct": Weighted(right, count)}

    def sums(logits: Array, batch: Told) -> dict[str, Weighted]:
        return named(*token_sums(logits, batch))

    def in_pieces(params: Any, batch: Told) -> dict[str, Weighted]:
        hidden: Any = loaded.model.apply({"params": params}, batch.ids, batch.mask, hidden=True)
        return named(*token_sums_in_pieces(lambda x: word_logits(params, x), hidden, batch))

    def applying(model: Any) -> Any:
        # Params may be quantised as they were loaded.
        return compressed(lambda params, batch: model.apply({"params": params}, batch.ids, batch.mask))

    def student(count: int, params: Any) -> tuple[Any, Any]:
        smaller = type(loaded.model)(replace(loaded.config, num_hidden_layers=count))
        return applying(smaller), fewer_layers(params, count)

    return Problem(
        name=name,
        params=lambda key: loaded.params,
        apply=applying(loaded.model),
        loss=lambda logits, batch: sums(logits, batch)["loss"],
        score=sums,
        sums=compressed(in_pieces),
        metrics=["perplexity", "accuracy"],
        train=train,
        val=val,
        test=test,
        targets=("layer_*/**/kernel",),
        layers=tuple(f"layer_{i}/**" for i in range(loaded.config.num_hidden_layers)),
        places=lambda batch: next_tokens(batch.ids, batch.told)[1],
        counts=lambda batch: batch.mask != 0,
        student=student,
        facts=facts,
    )
