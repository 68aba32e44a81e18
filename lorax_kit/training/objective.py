"""The loss of a whole batch, its gradient and the aux: sums over micro-batches and devices, divided once at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from lorax_kit.arrays.placement import partitioned
from lorax_kit.core.paths import Params, is_array
from lorax_kit.errors import LoraxError


class Weighted(NamedTuple):
    """A mean whose parts weigh differently: total / weight, where both add up over micro-batches and devices.

    A loss over tokens, of which every batch holds another number, returns `Weighted(jnp.sum(losses * mask),
    jnp.sum(mask))` instead of their quotient.

    Attributes:
      total: float (), the sum of weight times value.
      weight: float or int (), the sum of weights; a constant to the gradient.
    """

    total: Any
    weight: Any


class Sums(NamedTuple):
    """What adds up over micro-batches and devices.

    Attributes:
      loss: fp32; its weight is None where every part counts alike.
      aux: the loss's aux, each leaf a `Weighted` like `loss`.
      grads: of `loss.total` by the factors, or None.
    """

    loss: Weighted
    aux: Any
    grads: Any = None


Run = Callable[[Any, Params, Any, Array | None], Sums]
"""(factors, base, batch, key) -> sums of one micro-batch."""


def losses(loss_fn: Callable[..., Any], exact: bool) -> Run:
    """The loss and aux of a micro-batch, without gradients.

    Args:
      loss_fn: as given to `lk.make_step`.
      exact: whether nothing will be added to the aux, so that its leaves keep their dtypes.
    """

    def run(factors: Any, base: Params, batch: Any, key: Array | None) -> Sums:
        out = loss_fn(base, factors, batch) if key is None else loss_fn(base, factors, batch, key)
        value, aux = out if isinstance(out, tuple) and not isinstance(out, Weighted) else (out, None)
        loss = value if isinstance(value, Weighted) else Weighted(value, None)
        _check_number("loss", loss.total, jnp.floating)
        if isinstance(value, Weighted):
            _check_number("loss's weight", loss.weight, jnp.number)
        leaves, tree = jax.tree_util.tree_flatten_with_path(aux, is_leaf=lambda x: isinstance(x, Weighted))
        measured = [_addend(f"aux{jax.tree_util.keystr(path)}", x, exact) for path, x in leaves]
        return Sums(_constant_weight(loss), jax.tree_util.tree_unflatten(tree, measured))

    return run


def gradients(run: Run, scale: float = 1.0) -> Run:
    """The same with the gradient of the total by the factors.

    Args:
      scale: the gradient is taken of so many times the total, and divided by it.
    """

    def with_gradients(factors: Any, base: Params, batch: Any, key: Array | None) -> Sums:
        def total(factors: Any) -> tuple[Array, Sums]:
            sums = run(factors, base, batch, key)
            return sums.loss.total if scale == 1 else sums.loss.total * scale, sums

        (_, sums), grads = jax.value_and_grad(total, has_aux=True)(factors)
        if scale != 1:
            grads = jax.tree.map(lambda g: _widened(g) / scale, grads)
        return sums._replace(grads=grads)

    return with_gradients


def in_parts(run: Run, n: int, device: Array | None) -> Run:
    """The sums over `n` micro-batches, one after the other, each with a key of its own.

    Arrays of the batch are split along their first axis. What has none (numbers) reaches every micro-batch as it is,
    a random key folded with the micro-batch's number. Sums of floats are kept in at least fp32.

    Args:
      device: the place of this device among those that split the batch; None where one has the whole of it. Parts are
        numbered over all devices, so that keys are those of one device which takes as many parts one by one.
    """
    if n == 1 and device is None:
        return run
    if n == 1:

        def one_part(factors: Any, base: Params, batch: Any, key: Array | None) -> Sums:
            return run(factors, base, batch, None if key is None or device is None else jax.random.fold_in(key, device))

        return one_part

    def over_parts(factors: Any, base: Params, batch: Any, key: Array | None) -> Sums:
        leaves, tree = jax.tree_util.tree_flatten(batch)
        count = rows(batch, "accumulate")
        if count is not None and count % n:
            raise LoraxError(f"a batch of {count} does not divide into accumulate={n} micro-batches.")
        split = {i: _parts(x, n) for i, x in _arrays(leaves).items()}
        first = 0 if device is None else device * n
        keys = None if key is None else jax.vmap(partial(jax.random.fold_in, key))(first + jnp.arange(n))

        def part(number: Array, some: dict[int, Any], key: Array | None) -> Sums:
            micro = [some[i] if i in some else folded(x, number) for i, x in enumerate(leaves)]
            sums = run(factors, base, jax.tree_util.tree_unflatten(tree, micro), key)
            return jax.tree.map(_widened, sums)

        def add(total: Sums, xs: tuple[Array, dict[int, Any], Array | None]) -> tuple[Sums, None]:
            return jax.tree.map(jnp.add, total, part(*xs)), None

        xs = (jnp.arange(n), split, keys)
        shapes = jax.eval_shape(lambda xs: part(*xs), jax.tree.map(lambda x: x[0], xs))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, xs)[0]

    return over_parts


def means(sums: Sums, factors: Any, count: int) -> tuple[Array, Any, Any]:
    """(loss, aux, gradients in the dtypes of the factors) of sums over `count` equal parts."""

    def mean(x: Weighted) -> Any:
        if x.weight is not None:
            return x.total / x.weight
        return x.total if count == 1 else jnp.asarray(x.total, _float(x.total.dtype)) / count

    def divided(g: Array, like: Array) -> Array:
        weight = sums.loss.weight
        g = g if weight is None and count == 1 else g / jnp.asarray(count if weight is None else weight, g.dtype)
        return g.astype(like.dtype)

    grads = None if sums.grads is None else jax.tree.map(divided, sums.grads, factors)
    aux = jax.tree.map(mean, sums.aux, is_leaf=lambda x: isinstance(x, Weighted))
    return mean(sums.loss), aux, grads


def rows(batch: Any, who: str) -> int | None:
    """The number of examples: the size of the first axis of every array of a batch; None if it holds no arrays.

    Raises:
      LoraxError: a leaf that is neither an array nor a number, or arrays that differ; `who` wants to split them.
    """
    first: tuple[str, int] | None = None
    for path, x in jax.tree_util.tree_flatten_with_path(batch)[0]:
        name = f"batch{jax.tree_util.keystr(path)}"
        if not is_array(x) and not isinstance(x, bool | int | float | complex):
            raise LoraxError(f"{name} is a {type(x).__name__}; a batch holds arrays, numbers and random keys.")
        if jnp.ndim(x) == 0:
            continue
        if first is not None and x.shape[0] != first[1]:
            raise LoraxError(
                f"{name} has {x.shape[0]} entries along its first axis, {first[0]} has {first[1]}: {who} splits both.\n"
                "  repeat what all examples share once per example, or close over it;\n"
                "  random keys: jax.random.key(seed), which is never split"
            )
        first = first or (name, x.shape[0])
    return None if first is None else first[1]


def folded(x: Any, number: Array | int) -> Any:
    """A random key folded with a number; anything else as it is."""
    return jax.random.fold_in(x, number) if is_key(x) else x


def is_key(x: Any) -> bool:
    """Whether `x` is a typed random key."""
    return is_array(x) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _parts(x: Any, n: int) -> Any:
    """(n, rows / n, ...), where explicit axes that split the rows split those of each part, if they divide them."""

    def placed(y: Array) -> Array:
        where = jax.typeof(x).sharding
        first, *others = where.spec
        names = first if isinstance(first, tuple) else () if first is None else (first,)
        if y.shape[1] % prod(where.mesh.shape[name] for name in names):
            first = None
        return jax.sharding.reshard(y, where.update(spec=PartitionSpec(None, first, *others)))

    return partitioned(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), placed, x)


def _arrays(leaves: list[Any]) -> dict[int, Any]:
    return {i: x for i, x in enumerate(leaves) if jnp.ndim(x)}


def _check_number(name: str, x: Any, kind: Any) -> None:
    plain = is_array(x) or isinstance(x, bool | int | float)
    if plain and not is_key(x) and jnp.shape(x) == () and jnp.issubdtype(jnp.result_type(x), kind):
        return
    given = f"shape {jnp.shape(x)} and dtype {jnp.result_type(x)}" if plain else f"the type {type(x).__name__}"
    raise LoraxError(
        f"the {name} has {given}; it must be a {'float ' if kind is jnp.floating else ''}scalar.\n"
        "  return jnp.mean(losses), or (jnp.mean(losses), aux),\n"
        "  or lk.Weighted(jnp.sum(losses * weights), jnp.sum(weights)) in its place"
    )


def _constant_weight(x: Weighted) -> Weighted:
    weight = None if x.weight is None else jax.lax.stop_gradient(jnp.asarray(x.weight, jnp.float32))
    return Weighted(jnp.asarray(x.total, jnp.float32), weight)


def _addend(name: str, x: Any, exact: bool) -> Weighted:
    if isinstance(x, Weighted):
        return _constant_weight(x)
    if not is_array(x) and not isinstance(x, bool | int | float | complex):
        raise LoraxError(f"the loss's {name} is a {type(x).__name__}; aux holds arrays and numbers.")
    if not exact and is_key(x):
        raise LoraxError(
            f"the loss's {name} is a random key, of which there is no mean over micro-batches or devices.\n"
            "  leave it out of the aux"
        )
    return Weighted(jnp.asarray(x) if exact else _widened(jnp.asarray(x)), None)


def _float(dtype: Any) -> Any:
    """The dtype of a mean of values of `dtype`: a float of at least fp32."""
    if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32:
        return dtype
    return jnp.float32


def _widened(x: Array) -> Array:
    """What sums of `x` are kept in: at least fp32, whole numbers as int32 (exact, unlike fp32 above 2^24)."""
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return x.astype(_float(x.dtype))
    return x.astype(jnp.int32) if x.dtype == bool or x.dtype.itemsize < 4 else x
