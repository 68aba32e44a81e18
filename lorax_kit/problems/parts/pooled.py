"""A head on the hidden states of a pretrained model: what classification and regression are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from jax import Array

from lorax_kit.models.heads import classify, fresh_head
from lorax_kit.problems.parts.layers import fewer_layers
from lorax_kit.transform import compressed

if TYPE_CHECKING:
    from jaxtyping import Float

    from lorax_kit.models import Loaded

HEAD = "classifier"


class Pooled(NamedTuple):
    """A model that gives a vector for each text.

    Attributes:
      params: key -> the backbone under its part's name, and the head: the trained one, or a fresh one.
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


def pooled(loaded: Loaded, outputs: int, trained: Any = None) -> Pooled:
    """The mean over the tokens of an encoder, or the last token of a decoder, and a linear head; or a trained head.

    Args:
      outputs: of a fresh head.
      trained: params of a head that the model has, as `classify` takes them; None: a fresh one.
    """
    part = "decoder" if loaded.kind == "decoder" else "encoder"

    def params(key: Array) -> dict[str, Any]:
        own = loaded.params if loaded.kind == "encoder-decoder" else {part: loaded.params}
        return {**own, HEAD: trained or fresh_head(loaded.config.hidden_size, outputs, key)}

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
            return classify(loaded.family, params[HEAD], hidden, mask)

        return compressed(apply)  # params may be quantised as they were loaded

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
