"""Params in a safetensors file: arrays by path, and in its metadata what makes leaves in few bits or of products whole.

A dense leaf is the tensor PATH; a `LowRank` leaf is PATH/a, PATH/b and PATH/residual; of a `Quantised` leaf the arrays
are PATH:codes, PATH:scales and, with double quantisation, PATH:log_least and PATH:log_step. Files of version 0.1 have
PATH:step and PATH:offset, a linear code of the scales: these are read into fp32 scales, bit for bit what they meant.
A random key of JAX's typed form is its words, PATH:words.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kit.checkpoint.tensors import read_metadata, read_tensors, write_tensors
from lorax_kit.core.lowrank import LowRank
from lorax_kit.core.paths import Params, closest, flatten, is_array, unflatten
from lorax_kit.core.quantised import METHODS as QUANTISATIONS
from lorax_kit.core.quantised import Quantised
from lorax_kit.errors import ExportError
from lorax_kit.files.reading import read_whole
from lorax_kit.files.staging import refuse_existing, staged
from lorax_kit.json_text import parse_json

COMPACT = "lorax_kit.compact"
"""Key of the metadata."""
_ARRAYS: Mapping[type, tuple[str, ...]] = {
    LowRank: ("a", "b", "residual"),
    Quantised: ("codes", "scales", "log_least", "log_step"),
}
_SEPARATOR = {LowRank: "/", Quantised: ":"}
_KINDS = {kind.__name__: kind for kind in _ARRAYS}
_KEY = "Key"
DTYPES = frozenset(
    (
        *("float64", "float32", "float16", "bfloat16", "complex64", "bool"),
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    )
)
"""What both the format and JAX keep bit for bit."""


def save_tensors(file: str | Path, params: Params, *, overwrite: bool = False) -> None:
    """Write params, merged or factored, to a safetensors file, bit for bit.

    Args:
      file: to create; it appears whole or not at all.
      params: any pytree of arrays, random keys, `LowRank` and `Quantised` leaves (`lk.merge`, `lk.compress.compress`,
        `lk.quantize` make them).
      overwrite: replace an existing file; otherwise it is an error.

    Raises:
      AdapterError: the file exists.
      ExportError: params without arrays, or with a leaf that is none.

    Example:
      >>> import tempfile
      >>> file = tempfile.mkdtemp() + "/model.safetensors"
      >>> save_tensors(file, {"dense": {"kernel": jnp.ones((4, 3))}})
      >>> load_tensors(file)["dense"]["kernel"].shape
      (4, 3)
    """
    path = Path(file).absolute()
    refuse_existing(path, overwrite, None, "file")
    tensors: dict[str, np.ndarray] = {}
    compact: dict[str, dict[str, Any]] = {}
    for name, leaf in flatten(params, whole=(LowRank, Quantised))[0].items():
        _store(name, leaf, tensors, compact)
    if not tensors:
        raise ExportError("the params hold no arrays: there is nothing to export.")
    _check_nesting(tensors)
    with staged(path, overwrite) as new:
        write_tensors(new, tensors, {COMPACT: json.dumps(compact, sort_keys=True)})


def _store(path: str, leaf: Any, tensors: dict[str, np.ndarray], compact: dict[str, dict[str, Any]]) -> None:
    kind = type(leaf)
    if kind in _ARRAYS:
        static = {f.name: getattr(leaf, f.name) for f in fields(leaf) if f.name not in _ARRAYS[kind]}
        compact[path] = {"kind": kind.__name__, **static, "dtype": str(jnp.dtype(leaf.dtype))}
        for name in _ARRAYS[kind]:
            if getattr(leaf, name) is not None:
                _store(f"{path}{_SEPARATOR[kind]}{name}", getattr(leaf, name), tensors, compact)
        return
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        compact[path] = {"kind": _KEY, "implementation": str(jax.random.key_impl(leaf))}
        return _store(f"{path}:words", jax.random.key_data(leaf), tensors, compact)
    if not is_array(leaf):
        raise ExportError(f"{path!r} is a {kind.__name__}, no array; export params, not a model's settings.")
    if path in tensors:
        raise ExportError(f"two arrays of the params would share the name {path!r}; rename one.")
    if (
        path == "__metadata__"
        or str(leaf.dtype) not in DTYPES
        or not isinstance(leaf, np.ndarray | np.generic | jax.Array)
    ):
        own = path == "__metadata__"
        why = "a name that the format keeps for itself" if own else f"a {type(leaf).__name__} of dtype {leaf.dtype}"
        raise ExportError(f"{path!r} cannot be stored: it is {why}.")
    tensors[path] = np.asarray(leaf)


@read_whole
def load_tensors(file: str | Path, like: Params = None) -> Params:
    """Read what `save_tensors` wrote.

    Args:
      file: of `save_tensors`.
      like: params of the same paths, dense, when they are not nested dicts; their leaves may be shapes only.

    Returns:
      Nested dicts by path, or the structure of `like`, with the leaves that were saved.

    Raises:
      FileNotFoundError: no such file.
      AdapterError: a damaged file.
      ExportError: tensors without their metadata, or the other way; paths that are not those of `like`.
    """
    path = Path(file)
    tensors: dict[str, Any] = dict(read_tensors(path))
    try:
        compact = parse_json(read_metadata(path).get(COMPACT, "{}"))
        # The innermost first: the arrays of a product may be in few bits.
        for name in sorted(compact, key=len, reverse=True):
            if name in tensors:
                raise ValueError(f"{name} is there twice")
            tensors[name] = _restored(name, dict(compact[name]), tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ExportError(f"{str(path)!r} does not hold what its metadata say: {e!r}.\n  export it again") from None
    leaves = {name: _array(x) if isinstance(x, np.ndarray) else x for name, x in tensors.items()}
    _check_nesting(leaves)
    if like is None:
        return _nested(leaves)
    known, treedef = flatten(like)
    if odd := sorted(set(known) ^ set(leaves)):
        raise ExportError(
            f"{str(path)!r} and `like` differ at {odd[0]!r}.\n  closest in the file: {closest(odd[0], list(leaves))}"
        )
    for name, x in known.items():
        if tuple(x.shape) != tuple(leaves[name].shape):
            raise ExportError(
                f"{name!r} is {tuple(leaves[name].shape)} in {str(path)!r}, and {tuple(x.shape)} in `like`."
            )
    return unflatten({name: leaves[name] for name in known}, treedef)


def _array(x: np.ndarray) -> Any:
    """On the device; 64 bits stay numpy's where JAX would cut them to 32."""
    return jnp.asarray(x) if jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype else x


def _restored(path: str, static: dict[str, Any], tensors: dict[str, Any]) -> Any:
    """Build a compact leaf or a random key; its arrays are taken out of `tensors`."""
    if static["kind"] == _KEY:
        return jax.random.wrap_key_data(jnp.asarray(tensors.pop(f"{path}:words")), impl=static["implementation"])
    kind = _KINDS[static.pop("kind")]
    parts = {name: tensors.pop(f"{path}{_SEPARATOR[kind]}{name}", None) for name in _ARRAYS[kind]}
    for name in _ARRAYS[kind][:2]:
        if parts[name] is None:
            raise KeyError(f"{path}{_SEPARATOR[kind]}{name}")
    if kind is Quantised and f"{path}:offset" in tensors:
        step, offset = (tensors.pop(f"{path}:{name}") for name in ("step", "offset"))
        parts["scales"] = parts["scales"].astype(np.float32) * step + offset
    arrays = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in parts.items()}
    lists = {name: tuple(x) for name, x in static.items() if isinstance(x, list)}
    leaf = kind(**{**static, **lists, **arrays, "dtype": jnp.dtype(static["dtype"])})
    shape = jax.eval_shape(leaf.restore).shape
    if isinstance(leaf, Quantised) and (leaf.method not in QUANTISATIONS or leaf.codes.dtype.kind not in "iu"):
        raise ValueError(f"{path} is quantised by {leaf.method!r} in {leaf.codes.dtype}")
    if isinstance(leaf, LowRank) and leaf.a.shape[0] != leaf.b.shape[0]:
        raise ValueError(f"{path} has factors of {leaf.a.shape[0]} and {leaf.b.shape[0]} rows")
    if tuple(shape) != tuple(leaf.shape):
        raise ValueError(f"{path} is {shape}, not {leaf.shape}")
    return leaf


def _check_nesting(names: Collection[str]) -> None:
    """Raise `ExportError` where a name is both an array and a folder of arrays."""
    folders = {name.rsplit("/", i)[0] for name in names for i in range(1, name.count("/") + 1)}
    if both := sorted(folders & set(names)):
        raise ExportError(f"{both[0]!r} is the name of an array, and the beginning of another's; rename one.")


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = out
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return out
