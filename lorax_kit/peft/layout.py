"""How one array lies here and in torch: inputs and outputs of a parameter, leaves of a site, parameters as a whole.

torch counts inputs before the window of a convolution, (out, in, height, width); a kernel of JAX has them after it,
(height, width, in, out). Axes of an N-D kernel are flattened to (in, out) on the way out, and found again on the way
in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

from lorax_kit.core.site import Axes, Site
from lorax_kit.errors import AdapterError

CONVOLUTIONS = {1: "Conv1d", 2: "Conv2d", 3: "Conv3d"}


class Way(NamedTuple):
    """How torch sees one matrix of a parameter.

    Attributes:
      axes: inputs, outputs and stack, of the whole parameter.
      layer: see `TorchModule`.
      order: the input axes in torch's order, as positions in `axes.inputs`.
      inputs: their sizes in torch's order; one number for a linear layer.
      outputs: N.
    """

    axes: Axes
    layer: str
    order: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: int


def leaf_of(path: str) -> str:
    """The last name of a path; NNX ends every path in `value`."""
    names = [name for name in path.split("/") if name != "value"]
    return names[-1] if names else path


def way_of(shape: tuple[int, ...], axes: Axes, layer: str) -> Way | None:
    """A parameter under one reading; None where it cannot be read so."""
    sizes = [shape[i] for i in axes.inputs]
    outputs = prod(shape[i] for i in axes.outputs)
    if not layer.startswith("Conv") or layer == "Conv1D":
        return Way(axes, layer, tuple(range(len(sizes))), (prod(sizes),), outputs)
    if len(axes.outputs) != 1 or len(sizes) < 2 or CONVOLUTIONS.get(len(sizes) - 1) != layer:
        return None
    own = sorted((*axes.inputs, *axes.outputs))
    if axes.outputs[0] == own[-1]:
        order = (len(sizes) - 1, *range(len(sizes) - 1))
    elif axes.outputs[0] == own[0]:
        order = tuple(range(len(sizes)))
    else:
        return None
    return Way(axes, layer, order, tuple(sizes[i] for i in order), outputs)


def ways(
    path: str,
    shape: tuple[int, ...],
    stack: tuple[int, ...],
    given: tuple[Axes, str] | None,
    parameter: bool,
    inputs_first: bool,
) -> Iterator[Way]:
    """How a parameter may be read, its stacked axes known.

    Args:
      given: (axes, use) as a plan knows them; None: every way that its name allows. Kernels and embeddings are
        (*in, *out), a matrix of another name may also be (out, in).
      parameter: torch has no module for it (experts).
      inputs_first: it is transformers' Conv1D.
    """
    unstacked = tuple(i for i in range(len(shape)) if i not in stack)
    linear = "Parameter" if parameter else "Conv1D" if inputs_first else "Linear"
    pairs: list[tuple[Axes, tuple[str, ...]]] = []
    if given is not None:
        axes, use = given
        if set(axes.stack) == set(stack):
            window = CONVOLUTIONS.get(len(axes.inputs) - 1, "")
            kinds = {"lookup": ("Embedding",), "tied": ("Embedding",), "product": (linear,), "other": (window, linear)}
            pairs.append((axes, kinds[use]))
            if use != "other" and len(unstacked) == 2:  # PEFT may see a table as a layer whose outputs are its rows
                swapped = Axes(inputs=axes.outputs, outputs=axes.inputs, stack=axes.stack)
                pairs.append((swapped, (linear,) if use != "product" else ("Embedding",)))
    else:
        leaf, n = leaf_of(path), len(unstacked)
        for k in range(1, n):
            axes = Axes(inputs=unstacked[:k], outputs=unstacked[k:], stack=stack)
            layers: tuple[str, ...] = (linear,) if n < 4 or k < n - 1 else ()
            if n == 2 and leaf != "kernel":
                layers = ("Embedding",) if leaf == "embedding" else (*layers, "Embedding")
            if n >= 3 and k == n - 1 and leaf != "weight":
                layers = (*layers, CONVOLUTIONS.get(n - 2, ""))
            pairs.append((axes, layers))
        if n >= 2 and leaf not in ("kernel",) and not inputs_first:
            axes = Axes(inputs=unstacked[1:], outputs=unstacked[:1], stack=stack)
            pairs.append((axes, (linear,) if n == 2 else (CONVOLUTIONS.get(n - 2, ""),)))
    for axes, layers in pairs:
        for layer in layers:
            way = way_of(shape, axes, layer) if layer else None
            if way is not None:
                yield way


def matrix_of(way: Way, w: Any, index: tuple[int, ...]) -> np.ndarray:
    """One matrix (K, N) of a parameter, inputs in torch's order, float64."""
    axes = way.axes
    order = (*axes.stack, *(axes.inputs[i] for i in way.order), *axes.outputs)
    return np.transpose(np.asarray(w, np.float64), order)[index].reshape(prod(way.inputs), way.outputs)


def from_site(site: Site, way: Way, letters: str, x: Any, index: tuple[int, ...]) -> np.ndarray:
    """A leaf of one matrix as the forms have it: axes by `letters`, inputs flat and in torch's order."""
    x = np.asarray(x)
    if not letters.isupper():
        x = x[(slice(None), *index)] if letters.startswith("r") else x[index]
    letters = letters.lower()
    if "i" in letters:
        start = x.ndim - len(site.in_shape)
        x = np.transpose(x, (*range(start), *(start + i for i in way.order)))
        return x.reshape(*x.shape[:start], -1)
    return x.reshape(*x.shape[: x.ndim - len(site.out_shape)], -1) if "o" in letters else x


def to_site(site: Site, way: Way, letters: str, by_index: Mapping[tuple[int, ...], np.ndarray]) -> np.ndarray:
    """Inverse of `from_site`, for all matrices of a site."""
    out, shared = [], letters.isupper()
    letters = letters.lower()
    for x in by_index.values():
        if "i" in letters:
            start, sizes = x.ndim - 1, [site.in_shape[i] for i in way.order]
            x = x.reshape(*x.shape[:start], *sizes)
            back = np.argsort(way.order)
            x = np.transpose(x, (*range(start), *(start + int(i) for i in back)))
        elif "o" in letters:
            x = x.reshape(*x.shape[:-1], *site.out_shape)
        out.append(x)
    if not site.stack_shape or shared:
        return out[0]
    whole = np.stack(out).reshape(*site.stack_shape, *out[0].shape)
    n = len(site.stack_shape)
    return np.moveaxis(whole, n, 0) if letters.startswith("r") else whole


def in_torch(path: str, x: Any, inputs_first: bool) -> np.ndarray:
    """A parameter as a whole in torch's layout.

    Raises:
      AdapterError: a layout that the name does not tell.
    """
    return _exchange(path, np.asarray(x), inputs_first, lambda n: (n - 1, n - 2, *range(n - 2)))


def from_torch(path: str, x: np.ndarray, inputs_first: bool) -> np.ndarray:
    """Inverse of `in_torch`."""
    return _exchange(path, x, inputs_first, lambda n: (*range(2, n), 1, 0))


def _exchange(path: str, x: np.ndarray, inputs_first: bool, order: Callable[[int], tuple[int, ...]]) -> np.ndarray:
    if x.ndim < 2 or inputs_first or leaf_of(path) in ("embedding", "weight"):
        return x
    if leaf_of(path) == "kernel" and x.ndim in (2, 4, 5):
        return np.transpose(x, order(x.ndim))
    raise AdapterError(
        f"{path!r} of shape {x.shape} is trained in full, and its name does not tell its layout in torch.\n"
        "  use lk.save_adapter, or call a matrix 'kernel' (in, out), 'weight' or 'embedding' (as in torch)"
    )
