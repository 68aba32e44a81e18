"""Names for the leaves of any pytree of params: `encoder/layer_0/attention/query/kernel`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kit.errors import PlanError

Params = Any
"""A pytree of arrays as a model library gives it."""


class TorchName(str):
    """The name of a parameter in a torch model, with what the name alone does not say.

    Attributes:
      also: names under which the torch model has the same array once more: the head that is tied to an embedding. None:
        not known.
      inputs_first: torch stores the matrix (in, out), as we do: transformers' Conv1D.

    Example:
      >>> TorchName("model.embed_tokens.weight", also=("lm_head.weight",)).also
      ('lm_head.weight',)
    """

    also: tuple[str, ...] | None
    inputs_first: bool

    def __new__(cls, name: str, *, also: tuple[str, ...] | None = None, inputs_first: bool = False) -> TorchName:
        """The string itself, with the two attributes."""
        made = super().__new__(cls, name)
        made.also, made.inputs_first = also, inputs_first
        return made


class Packed:
    """A pytree node that stands for one parameter: `flatten` keeps it as one leaf (`Quantised`)."""


def _name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or stands for one (`ShapeDtypeStruct`); activations and settings are not."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def deleted(tree: Any) -> bool:
    """Whether an array of a tree has lost its buffer to a function that it was donated to."""
    arrays = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer))
    return any(x.is_deleted() for x in arrays)


def is_state(leaf: Any) -> bool:
    """Whether a leaf is a random key or a counter, which a forward pass advances: no weight.

    These are typed keys, integers without axes, and JAX's random state in uint32: keys of its older form (an axis of 2
    or 4 last) and counts of one axis at most (Flax's `RngCount`, of stacked layers, too).
    """
    if not is_array(leaf) or isinstance(leaf, Packed):
        return False
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return True
    if not jnp.issubdtype(leaf.dtype, jnp.integer):
        return False
    return leaf.shape == () or (leaf.dtype == jnp.uint32 and (len(leaf.shape) == 1 or leaf.shape[-1] in (2, 4)))


def flatten(
    params: Params, whole: tuple[type, ...] = (Packed,), leaf: Callable[[Any], bool] = lambda _: False
) -> tuple[dict[str, Any], jax.tree_util.PyTreeDef]:
    """Flatten params into an ordered dict path -> leaf, and the treedef to build them again.

    A node of a type in `whole`, or of which `leaf` is true, is a leaf. Leaves that are not arrays keep their place in
    the dict, so `unflatten` is an exact inverse.

    Raises:
      PlanError: two leaves share one path (a dict key holds a `/`), or the keys of a dict cannot be sorted.
    """
    try:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(
            params, is_leaf=lambda x: isinstance(x, whole) or leaf(x)
        )
    except ValueError as e:
        if "sorting pytree dictionary keys" not in str(e):
            raise
        raise PlanError(
            "the params hold a dict whose keys cannot be sorted, such as texts beside numbers.\n"
            "  JAX orders leaves by their keys: make them all texts"
        ) from None
    named: dict[str, Any] = {}
    for keys, x in leaves:
        path = "/".join(_name(key) for key in keys)
        if path in named:
            raise PlanError(
                f"two leaves of the params share the path {path!r}.\n"
                "  a dict key that holds '/' is ambiguous: rename it, or nest the dict"
            )
        named[path] = x
    return named, treedef


def unflatten(named: Mapping[str, Any], treedef: jax.tree_util.PyTreeDef) -> Params:
    """Inverse of `flatten`."""
    return jax.tree_util.tree_unflatten(treedef, list(named.values()))


def arrays_only(params: Params) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], Params]]:
    """Take the arrays of params, by path, apart from flags, numbers and strings, which `jit` would trace or refuse.

    Returns:
      (arrays, whole): `whole(arrays)` puts them back among the other leaves.
    """
    named, treedef = flatten(params)
    return {p: x for p, x in named.items() if is_array(x)}, lambda own: unflatten({**named, **own}, treedef)


def paths(params: Params) -> dict[str, jax.ShapeDtypeStruct]:
    """Every array of `params` by path, as shapes and dtypes.

    Example:
      >>> paths({"dense": {"kernel": np.zeros((2, 3), np.float32)}})
      {'dense/kernel': ShapeDtypeStruct(shape=(2, 3), dtype=float32)}
    """
    named, _ = flatten(params)
    return {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in named.items() if is_array(x)}


def closest(pattern: str, candidates: list[str]) -> str:
    """The candidate that looks most like `pattern`, with how many siblings share its last name."""
    if not candidates:
        return "none: the params hold no arrays"
    tail = pattern.replace("*", "").strip("/")
    best = get_close_matches(tail, candidates, n=1, cutoff=0.0)[0]
    last = best.rsplit("/", 1)[-1]
    alike = sum(path.rsplit("/", 1)[-1] == last for path in candidates) - 1
    return f"{best!r} ({alike} more end in {last!r})"


def nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of one array, of random keys, too."""
    itemsize = dtype.itemsize if jnp.issubdtype(dtype, jax.dtypes.extended) else np.dtype(dtype).itemsize
    return int(np.prod(shape, dtype=np.int64)) * itemsize
