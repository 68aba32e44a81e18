"""The training step over a mesh of data, fsdp and tensor axes, under `jit` with `NamedSharding`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lorax_kit.arrays.placement import DATA, FSDP
from lorax_kit.errors import LoraxError
from lorax_kit.parallel.layout import layout
from lorax_kit.parallel.mesh import replicate, shard
from lorax_kit.processes import spread
from lorax_kit.training.step import Info, Init, Loss, State, make_step

GATHERED = "gathered base"


def sharded_step(
    loss_fn: Loss,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    axis: str | tuple[str, ...] | None = None,
    accumulate: int = 1,
    loss_scale: float = 1.0,
    factors: Literal["replicated", "sharded"] = "replicated",
    local: bool = False,
) -> tuple[Init, ShardedStep]:
    """`lk.make_step` over the devices of a mesh, which may be of several processes.

    Batches are split along their first axis. The base lies where it was put: on every device (`replicate(base,
    mesh)`), or in parts, `lk.place(base, lk.layout(base, mesh))`. Parts along an axis that splits batches, too (fsdp),
    are gathered where they are used, in the backward pass once more: a device holds the whole of few parameters at a
    time. Parts along other axes (tensor) stay, and XLA's partitioner places the products. The gradient's reduction
    over devices is what it derives from the mean in the loss: of the factors alone.

    Every random number is that of one device: masks of dropout differ by example, wherever it lies.

    Args:
      loss_fn, tx, accumulate, loss_scale: as for `lk.make_step`.
      mesh: of any number of axes, explicit ones, too.
      axis: those that split batches. Default: "data" and "fsdp", as far as the mesh has them, or its only one.
      factors: "sharded": split factors and optimiser state over "fsdp", too (by size, as `lk.layout`).
      local: in several processes, each gives its own rows of the batch alone; else each gives the whole batch.

    Returns:
      `init`, which places the state, and `step(state, base, batch)`. A base that lies on one device, or on the host,
      is copied to all at every step. `step.lower` takes shapes, as that of a jitted function does.

    Raises:
      LoraxError: the mesh has no such axis; when called with a batch that the devices do not divide.

    Example:
      >>> import jax.numpy as jnp
      >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
      >>> init, step = sharded_step(lambda base, f, x: jnp.mean(x @ f["w"]) * base, optax.sgd(0.1), mesh)
      >>> state, info = step(init({"w": jnp.ones(3)}), 2.0, jnp.ones((4, 3)))
      >>> float(info.loss)
      6.0
    """
    if factors not in ("replicated", "sharded"):
        raise LoraxError(f"factors is {factors!r}; it is 'replicated' or 'sharded'.")
    if factors == "sharded" and FSDP not in mesh.shape:
        raise LoraxError(f"factors='sharded' splits them over {FSDP!r}; the mesh has {_names(mesh)}.")
    axes = _batch_axes(mesh, axis)
    options: dict[str, Any] = {"accumulate": accumulate, "loss_scale": loss_scale, "jit": False}
    init, _ = make_step(loss_fn, tx, **options)
    place = _sharded_by_size if factors == "sharded" else replicate

    def start(*args: Any, **kwargs: Any) -> State:
        placed: State = place(init(*args, **kwargs), mesh)
        return placed

    return start, ShardedStep(loss_fn, tx, mesh, axes, options, local)


class ShardedStep:
    """`step(state, base, batch)` of `lk.sharded_step`: one program for each way a base lies."""

    def __init__(
        self, loss_fn: Loss, tx: Any, mesh: Mesh, axes: tuple[str, ...], options: dict[str, Any], local: bool
    ) -> None:
        self._loss_fn, self._tx, self._mesh, self._axes = loss_fn, tx, mesh, axes
        self._options, self._local = options, local
        self._programs: dict[Any, Any] = {}

    def __call__(self, state: State, base: Any, batch: Any) -> tuple[State, Info]:
        """(new state, info); the state is donated."""
        base = _on(self._mesh, base)
        placed = shard(batch, self._mesh, self._axes, local=self._local)
        out: tuple[State, Info] = self.program(state, base)(state, base, placed)
        return out

    def lower(self, state: Any, base: Any, batch: Any) -> Any:
        """The program lowered for arrays, or for shapes that say where they lie (`jax.ShapeDtypeStruct`)."""
        return self.program(state, base).lower(state, base, batch)

    def program(self, state: Any, base: Any) -> Any:
        """The jitted function for a state and a base that lie as these do."""
        whole = NamedSharding(self._mesh, PartitionSpec())
        states = jax.tree.map(lambda x: x.sharding, state)
        used = [used_at(x, self._axes) for x in jax.tree.leaves(base)]
        key = (jax.tree.structure((state, base)), tuple(jax.tree.leaves(states)), tuple(used))
        if key not in self._programs:
            loss_fn = _gathering(self._loss_fn, used, self._mesh)
            _, step = make_step(loss_fn, self._tx, **self._options)
            self._programs[key] = jax.jit(on_mesh(step, self._mesh), out_shardings=(states, whole), donate_argnums=(0,))
        return self._programs[key]


def _names(mesh: Mesh) -> str:
    return f"the axes {', '.join(map(repr, mesh.axis_names))}"


def _batch_axes(mesh: Mesh, axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    names = tuple(mesh.axis_names)
    if axis is None:
        axis = tuple(x for x in (DATA, FSDP) if x in names) or (names if len(names) == 1 else DATA)
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    for one in axes:
        if one not in names:
            raise LoraxError(
                f"the mesh has {_names(mesh)}, and none is {one!r}.\n"
                f"  say which splits the batch: sharded_step(..., axis={names[0]!r})"
            )
    if len(set(axes)) < len(axes):
        raise LoraxError(f"axis is {axes}, which names an axis twice.")
    return axes


def _on(mesh: Mesh, base: Any) -> Any:
    """A base on the devices of the mesh: copied to all of them where it lies whole on others.

    Raises:
      LoraxError: it lies in parts on another mesh.
    """
    devices = list(mesh.devices.flat)

    def one(x: Any) -> Any:
        at = getattr(x, "sharding", None) if isinstance(x, jax.Array) else None
        there = at is not None and at.device_set == set(devices)
        if isinstance(at, NamedSharding) and list(at.mesh.devices.flat) != devices:
            if not at.is_fully_replicated:
                raise LoraxError(
                    "the base lies in parts on another mesh: other devices, or in another order.\n"
                    "  place it on this one: lk.place(base, lk.layout(base, mesh))"
                )
            there = False
        return x if there else spread(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(one, base)


def _sharded_by_size(state: Any, mesh: Mesh) -> Any:
    """Factors and optimiser state split by their shapes alone: those of one shape lie alike."""
    return spread(state, layout(state, mesh, {}))


def used_at(x: Any, axes: tuple[str, ...]) -> NamedSharding | None:
    """Where an array lies while it is used: whole along the axes that split batches; None where it lies so already."""
    at = getattr(x, "sharding", None)
    if not isinstance(at, NamedSharding):
        return None
    spec = [_without(entry, axes) for entry in at.spec]
    return None if spec == list(at.spec) else NamedSharding(at.mesh, PartitionSpec(*spec))


def _without(entry: Any, axes: tuple[str, ...]) -> Any:
    """An entry of a spec without some axes."""
    left = tuple(x for x in (entry if isinstance(entry, tuple) else (entry,)) if x is not None and x not in axes)
    return entry if not isinstance(entry, tuple) and left else left[0] if len(left) == 1 else left or None


def _gathering(loss_fn: Loss, used: list[NamedSharding | None], mesh: Mesh) -> Loss:
    """The loss of factors and a base in parts.

    Factors are whole where they are used, and so are their gradients: each device does what the optimiser does.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def loss(base: Any, factors: Any, *args: Any) -> Any:
        return loss_fn(gathered_base(base, used), jax.tree.map(lambda x: _moved(x, everywhere), factors), *args)

    return gathered_anew(loss) if any(used) else loss


def gathered_base(base: Any, used: list[NamedSharding | None]) -> Any:
    """A base whose arrays lie as they are used, within a loss that `gathered_anew` gives."""
    leaves, tree = jax.tree.flatten(base)
    pairs = zip(leaves, used, strict=True)
    placed = [x if at is None else checkpoint_name(_moved(x, at), GATHERED) for x, at in pairs]
    return jax.tree.unflatten(tree, placed)


def gathered_anew(loss: Loss) -> Loss:
    """The loss, whose backward pass gathers the parts of the base again instead of keeping them."""
    kept = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
    anew: Loss = jax.checkpoint(loss, policy=kept)
    return anew


def on_mesh(step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The step traced in the mesh's context, where it can ask whether it is split over devices."""
    if AxisType.Explicit in mesh.axis_types:
        return step

    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*args)

    return traced


def _moved(x: Any, at: NamedSharding) -> Any:
    explicit = AxisType.Explicit in at.mesh.axis_types
    return jax.sharding.reshard(x, at) if explicit else lax.with_sharding_constraint(x, at)
