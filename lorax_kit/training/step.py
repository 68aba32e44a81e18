"""The pure training step: (state, base, batch) -> (state, info), gradients for the factors only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lorax_kit.core.errors import LoraxError
from lorax_kit.core.leaves import FactorTree
from lorax_kit.core.paths import Params


class State(NamedTuple):
    """What training carries: donated to the step, so use only the newest.

    Attributes:
      factors: the trainable tree.
      opt_state: of the optimiser.
      step: int32 (), steps taken.
      key: random key for dropout, or None.
    """

    factors: Any
    opt_state: Any
    step: Array
    key: Array | None = None


class Info(NamedTuple):
    """What people watch.

    Attributes:
      loss: fp32 (), mean over the batch.
      grad_norm: fp32 (), global norm over the trained leaves, before clipping.
      finite: bool (), whether loss, gradients and new factors were finite; if not, the step changed no factor.
      aux: whatever the loss returned beside its value, mean over accumulated micro-batches.
    """

    loss: Array
    grad_norm: Array
    finite: Array
    aux: Any = None


Loss = Callable[..., Any]
Init = Callable[..., State]
Step = Callable[[State, Params, Any], tuple[State, Info]]


def make_step(
    loss_fn: Loss,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    axis_name: str | None = None,
    jit: bool = True,
) -> tuple[Init, Step]:
    """Build `(init, step)`.

    Args:
      loss_fn: `loss_fn(base, factors, batch)` or, if `init` was given a key, `loss_fn(base, factors, batch,
        key)`; returns a scalar, or `(scalar, aux)`.
      tx: from `lk.partition`, or any optax transformation over the factors.
      accumulate: micro-batches per step. Every batch leaf is split along its first axis; loss and gradients are
        their means, which is exact for a mean over equally weighted examples.
      axis_name: a mapped axis (`pmap`, `shard_map`) over which loss and gradients are averaged.
      jit: compile the step, donating the state (factors and optimiser state); the base and the batch are
        never donated. False returns the plain function, to be wrapped in `vmap`, `pmap` or a mesh.

    Returns:
      `init(factors, key=None) -> State` and `step(state, base, batch) -> (State, Info)`.

    Raises:
      LoraxError: `accumulate` below 1; at the first call, a batch that does not divide by it, or a loss that is
        not a float scalar.

    Example:
      >>> init, step = make_step(lambda base, f, x: jnp.sum((x * f["w"]) ** 2), optax.sgd(0.1))
      >>> state, info = step(init({"w": jnp.ones(3)}), None, jnp.ones(3))
      >>> float(info.loss), round(float(state.factors["w"][0]), 3)
      (3.0, 0.8)
    """
    if accumulate < 1:
        raise LoraxError(f"accumulate is {accumulate}; it must be at least 1.")

    def init(factors: FactorTree, key: Array | None = None) -> State:
        # A copy, because the first step donates it: the caller's factors stay valid.
        factors = jax.tree.map(lambda x: jnp.array(x, copy=True), dict(factors))
        return State(factors, tx.init(factors), jnp.zeros((), jnp.int32), None if key is None else jnp.copy(key))

    def value_and_grad(factors: Any, base: Params, batch: Any, key: Array | None) -> tuple[Array, Any, Any]:
        def loss(factors: Any) -> tuple[Array, Any]:
            out = loss_fn(base, factors, batch) if key is None else loss_fn(base, factors, batch, key)
            value, aux = out if isinstance(out, tuple) else (out, None)
            if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
                kind = f"shape {jnp.shape(value)} and dtype {jnp.result_type(value)}"
                raise LoraxError(
                    f"the loss has {kind}; it must be a float scalar.\n"
                    "  return jnp.mean(losses), or (jnp.mean(losses), aux)"
                )
            return jnp.asarray(value, jnp.float32), aux

        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(factors)
        return value, aux, grads

    def step(state: State, base: Params, batch: Any) -> tuple[State, Info]:
        key = None if state.key is None else jax.random.fold_in(state.key, state.step)
        if accumulate == 1:
            value, aux, grads = value_and_grad(state.factors, base, batch, key)
        else:
            value, aux, grads = _accumulated(value_and_grad, state.factors, base, batch, key, accumulate)
        if axis_name is not None:
            value, aux, grads = jax.lax.pmean((value, aux, grads), axis_name)
        norm = optax.tree.norm(grads).astype(jnp.float32)
        updates, opt_state = tx.update(grads, state.opt_state, state.factors)
        factors = optax.apply_updates(state.factors, updates)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        # A rate of infinity makes NaN of finite gradients: the factors themselves count, too.
        finite = jax.tree.reduce(lambda ok, x: ok & jnp.all(jax.lax.is_finite(x)), factors, finite)
        # One bad batch must not spoil the factors: the state stays, and `finite` tells.
        new, old = (factors, opt_state), (state.factors, state.opt_state)
        factors, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        return State(factors, opt_state, state.step + 1, state.key), Info(value, norm, finite, aux)

    return init, jax.jit(step, donate_argnums=(0,)) if jit else step


def _accumulated(
    value_and_grad: Callable[..., tuple[Array, Any, Any]],
    factors: Any,
    base: Params,
    batch: Any,
    key: Array | None,
    n: int,
) -> tuple[Array, Any, Any]:
    def micro(x: Array) -> Array:
        if x.shape[0] % n:
            raise LoraxError(f"a batch of {x.shape[0]} does not divide into accumulate={n} micro-batches.")
        return x.reshape(n, x.shape[0] // n, *x.shape[1:])

    keys = None if key is None else jax.random.split(key, n)

    def one(total: Any, xs: tuple[Any, Any]) -> tuple[Any, None]:
        out = value_and_grad(factors, base, xs[0], xs[1])
        return jax.tree.map(lambda t, x: t + x / n, total, out), None

    xs = (jax.tree.map(micro, batch), keys)
    shapes = jax.eval_shape(lambda x: value_and_grad(factors, base, *x), jax.tree.map(lambda x: x[0], xs))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(one, zeros, xs)[0]
