"""Where PEFT keeps what: the tensors of a site and of a parameter trained in full.

PEFT computes y = x W^T + s (x A^T) B^T with A (r, in) and B (out, r): A is our `a`, B is `b` transposed; of an
embedding, A is (r, vocab) and B (dim, r). DoRA's magnitude is (out,) in both. Axes of an N-D kernel are
flattened to (in, out) on the way out and found again from the base on the way in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_kit.core.errors import AdapterError
from lorax_kit.core.plan import Axes, Site
from lorax_kit.methods import DoRALeaves, Factors

PREFIX = "base_model.model."
# PEFT writes the magnitude without ".weight"; its modules and older files have it.
_KINDS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_KEYS = {kind: key for key, kind in reversed(_KINDS.items())}


def sort_out(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Factors (module -> kind -> tensor), and what is left by its name in the torch model.

    Raises:
      AdapterError: a name without PEFT's prefix, a dtype that is not fp32, bf16 or fp16.
    """
    factors: dict[str, dict[str, np.ndarray]] = {}
    rest: dict[str, np.ndarray] = {}
    for key, x in tensors.items():
        if not key.startswith(PREFIX):
            raise AdapterError(f"the tensor {key!r} is not PEFT's: its names start with {PREFIX!r}.")
        if str(x.dtype) not in ("float32", "bfloat16", "float16"):
            raise AdapterError(f"the tensor {key!r} is {x.dtype}; float32, bfloat16 and float16 can be read.")
        name = key.removeprefix(PREFIX)
        ending = next((e for e in _KINDS if name.endswith(f".{e}")), None)
        if ending is None:
            _refuse_named_adapter(key)
            rest[name] = x
        else:
            factors.setdefault(name.removesuffix(f".{ending}"), {})[_KINDS[ending]] = x
    return factors, rest


def _refuse_named_adapter(key: str) -> None:
    """Raise `AdapterError` for a tensor of a model in memory, whose name holds the adapter's behind the factor's."""
    factor = "|".join(sorted({e.removesuffix(".weight") for e in _KINDS}))
    own = re.search(rf"\.({factor})\.(?!weight$)(.+?)(\.weight)?$", key)
    if own:
        raise AdapterError(
            f"the tensor {key!r} names its adapter, {own[2]!r}, which the files of save_pretrained leave out.\n"
            f"  rename it: {key.replace(f'.{own[1]}.{own[2]}', f'.{own[1]}')!r}, or write it by save_pretrained"
        )


def factors_of(module: str, found: Mapping[str, np.ndarray], rank: int, dora: bool) -> tuple[np.ndarray, ...]:
    """(A, B) or (A, B, magnitude) of one module, complete and of one rank and dtype.

    Raises:
      AdapterError: one is missing or too much, has another rank or more axes (a convolution), or another dtype.
    """
    kinds = ["embedding_a", "embedding_b"] if "embedding_a" in found else ["a", "b"]
    kinds += ["magnitude"] * dora
    for kind in kinds:
        if kind not in found:
            raise AdapterError(f"{module!r} has no {_KEYS[kind]}, which its config and its other tensors call for.")
    for kind in found:
        if kind not in kinds:
            raise AdapterError(f"{module!r} has a {_KEYS[kind]} that its config and its other tensors do not call for.")
    a, b, *magnitude = (found[kind] for kind in kinds)
    if a.ndim != 2 or b.ndim != 2:
        raise AdapterError(
            f"{module!r} has factors of shapes {a.shape} and {b.shape}: only matrices can be read, no convolutions."
        )
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise AdapterError(
            f"{module!r} has factors of shapes {a.shape} and {b.shape}; its config says rank {rank}.\n"
            "  r, or a key of rank_pattern, does not belong to these tensors"
        )
    if magnitude and magnitude[0].shape != (b.shape[0],):
        raise AdapterError(f"{module!r} has a magnitude of shape {magnitude[0].shape} for {b.shape[0]} outputs.")
    if len({x.dtype for x in (a, b, *magnitude)}) > 1:
        raise AdapterError(f"{module!r} has factors of dtypes {a.dtype} and {b.dtype}; a site has one dtype.")
    return (a, b, *magnitude)


def to_tensors(site: Site, factors: Any) -> dict[str, np.ndarray]:
    """The tensors of one site by the ends of their names.

    Raises:
      AdapterError: a site that PEFT cannot express, a missing magnitude.
    """
    if site.axes.stack or site.use == "other":
        what = "is stacked over layers or experts" if site.axes.stack else "is neither multiplied nor looked up"
        raise AdapterError(
            f"{site.path!r} of shape {site.shape} {what}: PEFT's LoRA has no such factors.\n  use lk.save_adapter"
        )
    a, b = (np.asarray(x).reshape(site.rank, -1) for x in (factors.a, factors.b))
    embedding = "embedding_" if site.lookup or _leaf(site.path) == "embedding" else ""
    out: dict[str, np.ndarray] = {_KEYS[f"{embedding}a"]: a, _KEYS[f"{embedding}b"]: b.T}
    if site.setting.kind == "dora":
        out[_KEYS["magnitude"]] = np.asarray(factors.magnitude).reshape(-1)
    return out


def from_tensors(site: Site, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray | None = None) -> Any:
    """Inverse of `to_tensors`."""
    own = jnp.asarray(a.reshape(site.a_shape)), jnp.asarray(b.T.reshape(site.b_shape))
    return Factors(*own) if magnitude is None else DoRALeaves(*own, jnp.asarray(magnitude.reshape(site.out_shape)))


def find_axes(path: str, shape: tuple[int, ...], sizes: tuple[int, int], given: Axes | None, lookup: bool) -> Axes:
    """Which axes of a parameter are contracted.

    Args:
      sizes: (in, out) of its factors.
      given: the axes as a plan knows them; None: found from the sizes. Kernels and embeddings are (*in, *out),
        a matrix of another name may also be (out, in).

    Raises:
      AdapterError: no way to fit, or more than one.
    """
    if given is not None:
        ways = [given]
    else:
        ways = [Axes(inputs=tuple(range(k)), outputs=tuple(range(k, len(shape)))) for k in range(1, len(shape))]
        if len(shape) == 2 and not lookup and _leaf(path) != "kernel":
            ways.append(Axes(inputs=(1,), outputs=(0,)))
    fits = [w for w in ways if (_size(shape, w.inputs), _size(shape, w.outputs)) == sizes and not w.stack]
    if not fits:
        raise AdapterError(
            f"the adapter's factors take {sizes[0]} to {sizes[1]}, which {path!r} of shape {shape} does not.\n"
            "  load the base it was trained on; if its axes are contracted in another order: plan=lk.resolve(...)"
        )
    if len(fits) > 1:
        raise AdapterError(
            f"the adapter's factors fit {path!r} of shape {shape} in {len(fits)} ways: which axes are contracted?\n"
            "  say it by a plan: plan=lk.resolve(spec, params, apply_fn, *inputs)"
        )
    return fits[0]


def transposed(path: str, x: np.ndarray) -> np.ndarray:
    """A parameter trained in full in torch's layout, or one of torch's in ours: the same exchange both ways.

    Raises:
      AdapterError: a layout that the name does not tell.
    """
    if x.ndim < 2 or _leaf(path) in ("embedding", "weight"):
        return x
    if x.ndim == 2 and _leaf(path) == "kernel":
        return x.T
    raise AdapterError(
        f"{path!r} of shape {x.shape} is trained in full, and its name does not tell its layout in torch.\n"
        "  use lk.save_adapter, or call a matrix 'kernel' (in, out), 'weight' or 'embedding' (as in torch)"
    )


def _leaf(path: str) -> str:
    return path.rpartition("/")[2]


def _size(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    return prod(shape[i] for i in axes)
