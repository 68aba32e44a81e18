"""Next tokens of plays as a problem: a LLaMA decoder that is trained, studied or made smaller."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.core.specs.setting import is_int, shown
from lorax_kit.data import Plays, load_plays, spread_batches, window_batches, windows
from lorax_kit.errors import StudyError
from lorax_kit.models import LlamaModel, load_llama
from lorax_kit.problem import Problem
from lorax_kit.problems.parts.layers import fewer_layers
from lorax_kit.problems.settings import Settings
from lorax_kit.tasks import correct, cross_entropies, next_tokens
from lorax_kit.training import Weighted


@dataclass(frozen=True, kw_only=True)
class PlaysText(Settings):
    """Shakespeare's plays, continued by a LLaMA decoder; measured by perplexity on plays that were held out.

    Args:
      model: what `load_llama` takes: "smollm2", a GGUF file or a Hugging Face folder.
      batch_size, length: of all batches, in windows and tokens.
      held_out: how many windows each of validation (of the training plays, left out of training) and test have.
    """

    writes: ClassVar[bool] = True

    model: str = "smollm2"
    batch_size: int = 2
    length: int = 512
    held_out: int = 32

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 1), ("length", 2), ("held_out", 1)):
            x = getattr(self, name)
            if not is_int(x) or x < low:
                raise StudyError(f"problem {name} is {shown(x)}; it must be an integer of at least {low}.")
        if not isinstance(self.model, str):
            raise StudyError(f"problem model is {shown(self.model)}; it must be a string.")

    def build(self, plays: Plays | None = None) -> Problem:
        """Load weights and texts.

        Args:
          plays: the texts; default: Shakespeare's.

        Raises:
          MissingPackageError, FileNotFoundError, ValueError: what the loaders of models and plays raise.
        """
        loaded, plays = load_llama(self.model), plays or load_plays()
        config, params = loaded.config, loaded.params
        length = min(self.length, config.max_position_embeddings)

        def cut(texts: Sequence[str]) -> np.ndarray:
            return np.concatenate([windows(ids, length) for ids in loaded.tokenizer.encode(texts, 2**31)])

        rows = cut(plays.train)
        count = min(self.held_out, max(len(rows) // 4 // self.batch_size * self.batch_size, self.batch_size))
        chosen = np.linspace(0, len(rows) - 1, count // self.batch_size * self.batch_size).astype(int)
        train = np.delete(rows, chosen, axis=0)

        def batches(seed: int, start: int) -> Iterator[Any]:
            return window_batches(train, batch_size=self.batch_size, seed=seed, start=start)

        def sums(logits: Array, batch: Any) -> dict[str, Weighted]:
            label, weight = next_tokens(batch.ids, batch.mask)
            total = jnp.sum(weight)
            losses = jnp.sum(cross_entropies(logits, label) * weight)
            return {"loss": Weighted(losses, total), "correct": Weighted(correct(logits, label, weight), total)}

        def applying(model: LlamaModel) -> Any:
            return lambda params, batch: model.apply({"params": params}, batch.ids, batch.mask)

        def student(count: int, params: Any) -> tuple[Any, Any]:
            return applying(LlamaModel(replace(config, num_hidden_layers=count))), fewer_layers(params, count)

        return Problem(
            name="plays",
            params=lambda key: params,
            apply=applying(LlamaModel(config)),
            loss=lambda logits, batch: sums(logits, batch)["loss"],
            score=sums,
            metrics=["perplexity", "accuracy"],
            train=batches,
            val=spread_batches(rows[chosen], batch_size=self.batch_size, count=len(chosen)),
            test=spread_batches(cut(plays.test), batch_size=self.batch_size, count=self.held_out),
            targets=("layer_*/**/kernel",),
            layers=tuple(f"layer_{i}/**" for i in range(config.num_hidden_layers)),
            places=lambda batch: next_tokens(batch.ids, batch.mask)[1],
            counts=lambda batch: batch.mask,
            student=student,
            facts={
                "name": f"plays, {self.model}",
                "train": len(train),
                "val": len(chosen),
                "test": self.held_out,
                "steps_per_epoch": max(len(train) // self.batch_size, 1),
                "settings": asdict(self),
            },
        )
