"""What generation needs of a model: two pure functions of its params, whichever form these have.

Shapes: B rows, T tokens, V vocabulary, S slots of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.algebra import per_row
from lorax_kit.algebra.stack import Stacked
from lorax_kit.core.plan import Plan
from lorax_kit.errors import LoraxError
from lorax_kit.generate.in_place import in_place
from lorax_kit.models import Loaded
from lorax_kit.transform import adapt, compressed

Step = Callable[[Any, Array, Array, Any], tuple[Array, Any]]


@dataclass(frozen=True)
class Decoder:
    """A model that writes.

    Args:
      begin: (params, ids int32 (B, T), mask int32 (B, T), slots) -> (logits (B, V), cache): read the prompts, whose
        padding stands on the left, into a cache of so many slots; the logits are of the token after each.
      step: (params, ids (B, 1), mask (B, 1), cache) -> (logits (B, V), cache): read one more token a row.
      eos: ids that end a text.
      pad: id that fills prompts.
      positions: tokens of the longest text, prompt and what is written together; None: there is no limit.
      vocabulary: how many tokens the model has; None: not known.
      start: the token that begins what is written, where an encoder has read the prompt, which the cache does not hold
        then. None: a text goes on from its prompt.
      per_row: params hold an adapter for each row.

    `begin` and `step` are traced by JAX; arrays of the cache have the rows first, but for numbers all rows share.
    """

    begin: Callable[[Any, Array, Array, int], tuple[Array, Any]]
    step: Step
    eos: tuple[int, ...] = ()
    pad: int = 0
    positions: int | None = None
    vocabulary: int | None = None
    start: int | None = None
    per_row: bool = False

    @property
    def written_alone(self) -> bool:
        """Whether the cache holds what is written alone, not the prompt."""
        return self.start is not None


def decoder_of(loaded: Loaded) -> Decoder:
    """The decoder of a pretrained model, of its params as they are, quantised or compressed (`lk.compress`).

    Raises:
      LoraxError: an encoder, which writes nothing; an encoder-decoder that does not say what its texts begin with.
    """
    model, special = loaded.model, loaded.special
    facts: dict[str, Any] = {"eos": special.eos, "pad": special.pad or 0, "positions": loaded.positions}
    facts["vocabulary"] = loaded.config.vocab_size
    if loaded.kind == "decoder":

        def begin(params: Any, ids: Array, mask: Array, slots: int) -> tuple[Array, Any]:
            cache = model.empty_cache(ids.shape[0], slots)  # type: ignore[attr-defined]
            return step(params, ids, mask, cache)

        def step(params: Any, ids: Array, mask: Array, cache: Any) -> tuple[Array, Any]:
            outputs: Any = model.apply({"params": params}, ids, mask, cache)
            return outputs[0], outputs[1]

        return _of_any_form(Decoder(begin, step, **facts))
    if loaded.kind != "encoder-decoder":
        raise LoraxError(f"{loaded.source!r} is an encoder ({loaded.family}): it writes nothing.")
    start = special.start
    if start is None:
        raise LoraxError(f"{loaded.source!r} does not say which token its texts begin with: decoder_start_token_id.")

    def read(params: Any, ids: Array, mask: Array, slots: int) -> tuple[Array, Any]:
        hidden = model.apply({"params": params}, ids, mask, method="encode")
        cache = model.empty_cache(ids.shape[0], slots)  # type: ignore[attr-defined]
        first = jnp.full((ids.shape[0], 1), start, jnp.int32)
        ones = jnp.ones_like(first)
        outputs: Any = model.apply({"params": params}, first, ones, hidden, mask, cache, method="decode")
        return outputs[0], outputs[1]

    def write(params: Any, ids: Array, mask: Array, cache: Any) -> tuple[Array, Any]:
        outputs: Any = model.apply({"params": params}, ids, mask, None, None, cache, method="decode")
        return outputs[0], outputs[1]

    return _of_any_form(Decoder(read, write, **facts, start=start))


def _of_any_form(decoder: Decoder) -> Decoder:
    """The same decoder, of which params may be `Quantised` or `LowRank`."""

    def begin(params: Any, ids: Array, mask: Array, slots: int) -> tuple[Array, Any]:
        outputs: Any = compressed(lambda params, ids, mask: decoder.begin(params, ids, mask, slots))(params, ids, mask)
        return outputs[0], outputs[1]

    return replace(decoder, begin=begin, step=compressed(decoder.step))


def adapted(decoder: Decoder, plan: Plan) -> Decoder:
    """A decoder with a factored adapter: its params are the pair (base, factors).

    Other factors of the same plan need no new program.
    """

    def begin(params: Any, ids: Array, mask: Array, slots: int) -> tuple[Array, Any]:
        return adapt(lambda p, ids, mask: decoder.begin(p, ids, mask, slots), plan)(*params, ids, mask)

    def step(params: Any, ids: Array, mask: Array, cache: Any) -> tuple[Array, Any]:
        return adapt(decoder.step, plan)(*params, ids, mask, cache)

    return replace(decoder, begin=begin, step=step)


def per_row_decoder(decoder: Decoder, stacked: Stacked) -> Decoder:
    """A decoder whose rows each have their own adapter: its params are (base, lk.algebra.rows_of(stacked, which)).

    Args:
      stacked: from `lk.algebra.stack`.

    `which` (rows,) holds for each row the index of its adapter. Which rows have which adapter changes without a new
    program. The factors of each row are gathered once, before all steps: a copy in each took up to a tenth of its time.
    """

    def begin(params: Any, ids: Array, mask: Array, slots: int) -> tuple[Array, Any]:
        base, factors = params
        batched = per_row(in_place(lambda p, ids, mask: decoder.begin(p, ids, mask, slots)), stacked)
        logits, cache = batched(base, factors, ids, mask)
        _, like = jax.eval_shape(lambda: decoder.begin(base, ids, mask, slots))
        return logits, _once(cache, like)

    def step(params: Any, ids: Array, mask: Array, cache: Any) -> tuple[Array, Any]:
        base, factors = params
        leaves, tree = jax.tree.flatten(cache)
        rows = {i: x for i, x in enumerate(leaves) if x.ndim}
        # What all rows share stays one number: a slot of each row's own would make every write a scatter.
        shared = {i: x for i, x in enumerate(leaves) if not x.ndim}

        def own(p: Any, ids: Array, mask: Array, rows: dict[int, Array], shared: dict[int, Array]) -> tuple[Array, Any]:
            both = rows | shared
            return in_place(decoder.step)(p, ids, mask, jax.tree.unflatten(tree, [both[i] for i in range(len(both))]))

        logits, after = per_row(own, stacked)(base, factors, ids, mask, rows, shared=shared)
        return logits, _once(after, cache)

    return replace(decoder, begin=begin, step=step, per_row=True)


def _once(rows: Any, like: Any) -> Any:
    """A cache of whose numbers each row brought its own, the same, with one of each."""
    return jax.tree.map(lambda x, y: x if y.ndim else x[0], rows, like)
