"""Where the parts of an array lie, as its type tells: axes of devices along which it varies."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from jax import lax

Tree = TypeVar("Tree")


def varies(x: Any) -> frozenset[str]:
    """The mapped axes of devices along which a value differs: none outside `shard_map`, or where it does not check."""
    aval = jax.typeof(x)
    manual = getattr(aval, "manual_axis_type", None)  # since JAX 0.10.2
    return frozenset(manual.varying if manual is not None else getattr(aval, "vma", frozenset()))


def varying(tree: Tree, axes: frozenset[str]) -> Tree:
    """Arrays said to differ along mapped axes, as rules of derivatives need it; as they are where nothing checks."""

    def vary(x: Any) -> Any:
        missing = tuple(sorted(axes - varies(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    told: Tree = jax.tree.map(vary, tree)
    return told


def alike(tree: Tree) -> Tree:
    """Arrays that differ by device, if any of them does."""
    return varying(tree, frozenset().union(*map(varies, jax.tree.leaves(tree))))
