"""Models of fewer layers, made of a larger one's."""

from __future__ import annotations

from lorax_kit.core.paths import Params
from lorax_kit.errors import CompressError


def fewer_layers(params: Params, count: int) -> Params:
    """Of modules named `layer_i`, `count` evenly spread ones from the first to the last, renamed; the rest as it is.

    How a student starts (DistilBERT, Sanh et al., arXiv 1910.01108, section 3).
    """
    total = sum(name.startswith("layer_") for name in params)
    if not 1 <= count <= total:
        raise CompressError(f"a student of {count} layers; the model has {total}.")
    taken = [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]
    rest = {name: x for name, x in params.items() if not name.startswith("layer_")}
    return {**rest, **{f"layer_{i}": params[f"layer_{own}"] for i, own in enumerate(taken)}}
