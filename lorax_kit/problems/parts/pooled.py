"""A linear head on the pooled hidden states of a pretrained model: what classification and regression are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.problems.parts.layers import fewer_layers

if TYPE_CHECKING:
    from jaxtyping import Float

    from lorax_kit.models import Loaded

HEAD, SPREAD = "classifier", 0.02


class Pooled(NamedTuple):
    """A model that gives a vector for each text.

    Attributes:
      params: key -> the backbone under its part's name, and a fresh head: a kernel from N(0, 0.02^2), a bias of zero.
      apply: (params, batch) -> outputs fp32 (B, outputs), of a batch with ids and mask.
      targets: patterns of the backbone's kernels.
      layers: patterns of each of its layers.
      student: (number of layers, params) -> (apply, params); None where the family's layers cannot be left out.
    """

    params: Callable[[Array], dict[str, Any]]
    apply: Callable[[Any, Any], Float[Array, "B C"]]
    targets: tuple[str, ...]
    layers: tuple[str, ...]
    student: Callable[[int, Any], tuple[Callable[[Any, Any], Any], Any]] | None


def pooled(loaded: Loaded, outputs: int) -> Pooled:
    """The mean over the tokens of an encoder, or the last token of a decoder, and a linear head."""
    part = "decoder" if loaded.kind == "decoder" else "encoder"

    def params(key: Array) -> dict[str, Any]:
        kernel = SPREAD * jax.random.normal(key, (loaded.config.hidden_size, outputs), jnp.float32)
        own = loaded.params if loaded.kind == "encoder-decoder" else {part: loaded.params}
        return {**own, HEAD: {"kernel": kernel, "bias": jnp.zeros(outputs, jnp.float32)}}

    def applying(model: Any) -> Callable[[Any, Any], Array]:
        def apply(params: Any, batch: Any) -> Float[Array, "B C"]:
            ids, mask = batch.ids, batch.mask
            if loaded.kind == "encoder":
                hidden = model.apply({"params": params[part]}, ids, mask)
            elif loaded.kind == "decoder":
                hidden = model.apply({"params": params[part]}, ids, mask, hidden=True)
            else:
                backbone = {name: x for name, x in params.items() if name != HEAD}
                hidden = model.apply({"params": backbone}, ids, mask, method="encode")
            vector = _last(hidden, mask) if loaded.kind == "decoder" else _mean(hidden, mask)
            return vector @ params[HEAD]["kernel"] + params[HEAD]["bias"]

        return apply

    def student(count: int, params: Any) -> tuple[Callable[[Any, Any], Any], Any]:
        smaller = type(loaded.model)(replace(loaded.config, num_hidden_layers=count))
        return applying(smaller), {**params, part: fewer_layers(params[part], count)}

    count = loaded.config.num_hidden_layers
    return Pooled(
        params,
        applying(loaded.model),
        (f"{part}/layer_*/**/kernel",),
        tuple(f"{part}/layer_{i}/**" for i in range(count)),
        None if loaded.kind == "encoder-decoder" else student,
    )


def _mean(hidden: Float[Array, "B T D"], mask: Array) -> Float[Array, "B D"]:
    kept = (mask != 0).astype(jnp.float32)[..., None]  # (B, T, 1)
    return jnp.sum(hidden.astype(jnp.float32) * kept, axis=1) / jnp.maximum(jnp.sum(kept, axis=1), 1.0)


def _last(hidden: Float[Array, "B T D"], mask: Array) -> Float[Array, "B D"]:
    """Of the last token that counts."""
    place = jnp.max(jnp.where(mask != 0, jnp.arange(mask.shape[1]), 0), axis=1)
    return jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0].astype(jnp.float32)
