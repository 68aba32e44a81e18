"""Where the parts of an array lie, as its type tells: devices along which it varies, meshes with explicit axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")
DATA, FSDP, TENSOR, TRIAL = "data", "fsdp", "tensor", "trial"
"""What the axes of a mesh split: batches; batches and the base; the base alone; the trials of a study."""


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


def explicit_mesh(tree: Any) -> Any:
    """The mesh with explicit axes (as `jax.make_mesh` has them) that the types of arrays name; None without one."""
    for x in jax.tree.leaves(tree):
        mesh = getattr(jax.typeof(x).sharding, "mesh", None) if isinstance(x, jax.Array) else None
        if mesh is not None and AxisType.Explicit in (mesh.axis_types or ()):
            return mesh
    return None


def partitioned_axes() -> frozenset[str]:
    """The axes over which XLA's partitioner splits what is traced now, where that was told (`lk.sharded_step`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return frozenset()
    sizes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return frozenset(name for name, size, kind in sizes if size > 1 and kind == AxisType.Auto)


def replicated(mesh: Any) -> NamedSharding:
    """On all devices of a mesh."""
    return NamedSharding(mesh, PartitionSpec())


def partitioned(fn: Callable[..., Any], placed: Callable[[Any], Any], *args: Any) -> Any:
    """`placed(fn(*args))`, where `fn` knows nothing of explicit axes: XLA's partitioner places what it forms.

    With explicit axes JAX wants every ambiguous product and reshape told where its result lies. What the library
    itself computes has one place that matters, that of the result.

    Args:
      fn: any function of arrays; called as it is where no array lies on a mesh with explicit axes.
      placed: puts results where they shall lie, by `jax.sharding.reshard`; not called otherwise.
      *args: pytrees.
    """
    mesh = explicit_mesh(args)
    if mesh is None:
        return fn(*args)
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = [name for name, kind in kinds.items() if kind == AxisType.Explicit]
    automatic = mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto))
    with jax.sharding.use_abstract_mesh(automatic):
        out = fn(*jax.tree.map(_moved, args))
    return placed(out)


def _moved(x: Any) -> Any:
    """An array in the mesh that is current."""
    return jax.sharding.reshard(x, PartitionSpec()) if isinstance(x, jax.Array) else x


def like(x: Any) -> Callable[[Any], Any]:
    """Places results where `x` lies."""
    return lambda out: jax.tree.map(lambda y: jax.sharding.reshard(y, jax.typeof(x).sharding), out)


def everywhere(tree: Any) -> Callable[[Any], Any]:
    """Places results on all devices of the mesh of a tree."""
    mesh = explicit_mesh(tree)
    return lambda out: jax.tree.map(lambda y: jax.sharding.reshard(y, replicated(mesh)), out)
