"""Where the params lie on a mesh: rules by path for tensor parallelism, the rest split by size along "fsdp"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorax_kit.arrays.placement import FSDP, TENSOR
from lorax_kit.core.lowrank import LowRank
from lorax_kit.core.paths import flatten, is_array, unflatten
from lorax_kit.core.plan import matched
from lorax_kit.core.quantised import Quantised
from lorax_kit.core.specs.patterns import expand_braces, matches
from lorax_kit.errors import LoraxError
from lorax_kit.processes import spread

Axes = tuple[str | None, ...]
"""The axis of the mesh that splits each axis of a parameter, or None."""

PACKAGED_RULES: dict[str, Axes] = {
    "**/layer_*/**/{query,key,value,up,gate}/kernel": (None, TENSOR),
    "**/layer_*/**/{query,key,value,up,gate}/bias": (TENSOR,),
    "**/layer_*/**/{output,down}/kernel": (TENSOR, None),
    "**/{word,embedding,embeddings}/embedding": (TENSOR, None),
    "head/kernel": (None, TENSOR),
}
"""Of the models of `load_model` (Shoeybi et al., arXiv 1909.08053): one sum over devices per attention and per MLP."""
_PACKAGED = {one: axes for pattern, axes in PACKAGED_RULES.items() for one in expand_braces(pattern)}
SMALLEST = 1024
"""Entries below which a parameter is not worth splitting."""


def layout(params: Any, mesh: Mesh, rules: Mapping[str, Axes] | None = None, *, smallest: int = SMALLEST) -> Any:
    """Say where each array of params, or of a base, lies: a tree of `NamedSharding`, for `lk.place`.

    What rules name is split as they say. Where the mesh has an axis "fsdp", each array of at least `smallest`
    entries is split along it, too: of the axes that its devices divide the largest that no rule splits. A step gathers
    those arrays where it uses them (`lk.sharded_step`). Arrays of quantised and low-rank parameters are split alike.

    Args:
      params: arrays, or `jax.ShapeDtypeStruct`s for a plan without weights.
      mesh: as of `lk.training_mesh`.
      rules: pattern of paths -> for each axis of the parameter the axis of the mesh that splits it, or None; the
        first that matches holds. Default: those of the models of `lk.load_model`, where the mesh has "tensor"; they
        leave an axis whole that the devices do not divide (of 30,522 words, say).
      smallest: entries.

    Returns:
      The tree of `params` with a sharding for each array; what is no array is None.

    Raises:
      LoraxError: an axis that the mesh lacks, a rule of another number of axes, or devices that do not divide an axis;
        a mesh with more than one device along "tensor" and no rule for it.
      PlanError: a rule that matches nothing.

    Example:
      >>> params = {"up": {"kernel": jax.ShapeDtypeStruct((64, 256), "float32")}}
      >>> mesh = jax.sharding.AbstractMesh((2, 4), ("fsdp", "tensor"))
      >>> layout(params, mesh, {"up/kernel": (None, "tensor")})["up"]["kernel"].spec
      P('fsdp', 'tensor')
    """
    named, treedef = flatten(params, whole=(Quantised, LowRank))
    checked = _checked(rules, mesh, [p for p, x in named.items() if _holds_arrays(x)])
    if rules is None and mesh.shape.get(TENSOR, 1) > 1 and not any(_axes_of(p, x, checked) for p, x in named.items()):
        raise LoraxError(
            f"the mesh has {mesh.shape[TENSOR]} devices along {TENSOR!r}, and no parameter has a name that tells how "
            f"to split it.\n  rules={{'**/up/kernel': (None, {TENSOR!r}), ...}}"
        )
    return unflatten({path: _shardings(path, x, checked, mesh, smallest) for path, x in named.items()}, treedef)


def _shardings(path: str, x: Any, rules: Mapping[str, Axes], mesh: Mesh, smallest: int) -> Any:
    """Where the arrays of one parameter lie."""
    if not _holds_arrays(x):
        return None
    axes, parts = _axes_of(path, x, rules), jax.tree.leaves(x)
    wanted = [_for_part(x, part, axes, mesh) for part in parts]
    if rules is _PACKAGED:
        wanted = [_dividing(part, some, mesh) for part, some in zip(parts, wanted, strict=True)]
    specs = [_with_fsdp(path, part, some, mesh, smallest) for part, some in zip(parts, wanted, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(x), [NamedSharding(mesh, spec) for spec in specs])


def onto(mesh: Mesh, rules: Mapping[str, Axes] | None = None, *, smallest: int = SMALLEST) -> Callable[[str, Any], Any]:
    """Place parameters one by one, as `lk.layout` says: for `load_model(source, place=onto(mesh))`.

    The whole of a parameter is on the host, its parts on the devices, and the next is read only then: no device, nor
    the host, need hold the model.

    Args:
      mesh, rules, smallest: as for `lk.layout`; a rule that matches nothing is not noticed here.

    Returns:
      (path, parameter) -> the parameter on the mesh.

    Raises:
      LoraxError: as `lk.layout`.
    """
    own = _spelled(rules, mesh)
    return lambda path, x: place(x, _shardings(path, x, own, mesh, smallest))


def place(params: Any, layout: Any) -> Any:
    """Put each array where a layout says; of host arrays (numpy, memory maps) a device is given its part alone.

    Works in several processes, each of which has the same params, or maps the same files.

    Args:
      params: the tree; it is not changed.
      layout: of `lk.layout`: a sharding for each array, None for what stays as it is.
    """
    return jax.tree.map(lambda x, at: x if at is None else spread(x, at), params, layout)


def device_bytes(params: Any, layout: Any) -> int:
    """Bytes of params on one device: the most that any has of them.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((4,), ("fsdp",))
      >>> params = {"w": jax.ShapeDtypeStruct((64, 256), "float32"), "b": jax.ShapeDtypeStruct((256,), "float32")}
      >>> device_bytes(params, layout(params, mesh))
      17408
    """

    def held(x: Any, at: Any) -> int:
        return 0 if at is None else prod(at.shard_shape(x.shape)) * x.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(held, params, layout)))


def _holds_arrays(x: Any) -> bool:
    return isinstance(x, LowRank) or is_array(x)


def _checked(rules: Mapping[str, Axes] | None, mesh: Mesh, names: list[str]) -> dict[str, Axes]:
    """The rules by single patterns, each of the user's own of which matches something."""
    for pattern in rules or ():
        matched(f"the rule {pattern!r}", pattern, names, " to split")
    return _spelled(rules, mesh)


def _spelled(rules: Mapping[str, Axes] | None, mesh: Mesh) -> dict[str, Axes]:
    """The rules by single patterns, on axes that the mesh has."""
    if rules is None:
        return _PACKAGED if TENSOR in mesh.shape else {}
    for pattern, axes in rules.items():
        named = [axis for axis in axes if axis is not None]
        if len(set(named)) < len(named):
            raise LoraxError(f"the rule {pattern!r} names an axis of the mesh twice: {axes}.")
        for axis in axes:
            if axis is not None and axis not in mesh.shape:
                known = ", ".join(map(repr, mesh.shape))
                raise LoraxError(f"the rule {pattern!r} names the axis {axis!r}; the mesh has {known}.")
    return {one: axes for pattern, axes in rules.items() for one in expand_braces(pattern)}


def _axes_of(path: str, x: Any, rules: Mapping[str, Axes]) -> Axes:
    """What the first rule that matches says of a parameter."""
    rule = next((axes for pattern, axes in rules.items() if matches(pattern, path)), ())
    if rule and len(rule) != len(x.shape):
        raise LoraxError(f"{path!r} has shape {x.shape}; its rule {rule} is for {len(rule)} axes.")
    return rule


def _for_part(x: Any, part: Any, axes: Axes, mesh: Mesh) -> Axes:
    """The axes for one of the arrays that a parameter is made of."""
    if not axes:
        return (None,) * len(part.shape)
    if isinstance(x, Quantised):  # codes and scales have its axes, the range of the scales has one entry of each
        # A row may have fewer blocks than the devices divide: their scales are then whole on each.
        whole = (None,) * len(part.shape)
        return axes if part is x.codes else _dividing(part, axes, mesh) if part is x.scales else whole
    if isinstance(x, LowRank) and part is not x.residual:
        inner = x.inputs if part is x.a else x.outputs
        return (None, *(axes[i] for i in (*x.stack, *inner)))
    return axes


def _dividing(part: Any, axes: Axes, mesh: Mesh) -> Axes:
    """The axes that the devices divide, the others whole."""
    pairs = zip(part.shape, axes, strict=True)
    return tuple(None if axis is None or size % mesh.shape[axis] else axis for size, axis in pairs)


def _with_fsdp(path: str, part: Any, axes: Axes, mesh: Mesh, smallest: int) -> PartitionSpec:
    """The spec of an array, its largest axis split along "fsdp", too, where the devices divide it."""
    sizes = list(part.shape)
    for i, axis in enumerate(axes):
        parts = 1 if axis is None else mesh.shape[axis]
        if sizes[i] % parts:
            raise LoraxError(
                f"{path!r} of shape {tuple(part.shape)} does not split over {parts} devices along its axis {i}."
            )
        sizes[i] //= parts
    spec: list[Any] = list(axes)
    devices = mesh.shape.get(FSDP, 1)
    if devices > 1 and FSDP not in axes and prod(part.shape) >= smallest:
        free = [i for i, n in enumerate(sizes) if n % devices == 0 and n >= devices]
        if free:
            most = max(free, key=lambda i: (spec[i] is None, sizes[i], -i))
            spec[most] = FSDP if spec[most] is None else (spec[most], FSDP)
    return PartitionSpec(*spec)
