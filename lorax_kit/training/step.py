"""The pure training step: (state, base, batch) -> (state, info), gradients for the factors only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lorax_kit.arrays.placement import varying
from lorax_kit.core.leaves import FactorTree, check_key
from lorax_kit.core.paths import Params
from lorax_kit.core.specs.setting import is_int, is_number, plain, shown
from lorax_kit.errors import LoraxError
from lorax_kit.training.objective import Run, gradients, in_parts, losses, means
from lorax_kit.training.optimisers.extra import check_transformation, extra_arguments, started, updated


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
      aux: whatever the loss returned beside its value: where there are several micro-batches or devices their mean,
        fp32 for whole numbers and bools (the share); `lk.Weighted` as total / weight.
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
    axis_name: str | tuple[str, ...] | None = None,
    loss_scale: float = 1.0,
    jit: bool = True,
) -> tuple[Init, Step]:
    """Build `(init, step)`.

    Args:
      loss_fn: `loss_fn(base, factors, batch)` or, if `init` was given a key, `loss_fn(base, factors, batch,
        key)`; returns a scalar, or `(scalar, aux)`. A scalar is the mean of the batch; where micro-batches or
        devices weigh differently (tokens, padding), return `lk.Weighted(total, weight)` in its place, which is exact
        for any split. `aux` may hold `lk.Weighted`, too.
      tx: from `lk.partition`, or any optax transformation over the factors; weight decay of one without a partition
        moves frozen leaves, too. One that needs more than the gradient is given it: `value`, `grad`, `value_fn` (line
        searches), `obj_fn`, `grad_fn`.
      accumulate: micro-batches per step. Every array of the batch is split along its first axis; numbers reach
        every micro-batch as they are, random keys (`jax.random.key`) folded with its number. Loss and gradients are
        means, summed in at least fp32.
      axis_name: a mapped axis (`pmap`, `shard_map`), or several, over which loss and gradients are averaged. Each part
        of a batch has a key of its own, folded with its number: n devices draw what one does with accumulate=n.
      loss_scale: gradients are taken of so many times the loss, and divided by it: of params in float16 those below
        6e-8 are zero otherwise (Micikevicius et al., 2018). A power of two changes no other digit; where `info.finite`
        is false step after step, it is too large. bfloat16 needs none: it has the range of float32.
      jit: compile the step, donating the state (factors and optimiser state); the base and the batch are
        never donated. False returns the plain function, to be wrapped in `vmap`, `pmap` or a mesh.

    Returns:
      `init(factors, key=None) -> State` and `step(state, base, batch) -> (State, Info)`.

    Raises:
      LoraxError: `accumulate` below 1; a `loss_scale` that is not positive; at the first call, a batch that does not
        divide by `accumulate`, a loss that is not a float scalar, or an optimiser that needs what a step does not
        have.

    Example:
      >>> init, step = make_step(lambda base, f, x: jnp.sum((x * f["w"]) ** 2), optax.sgd(0.1))
      >>> state, info = step(init({"w": jnp.ones(3)}), None, jnp.ones(3))
      >>> float(info.loss), round(float(state.factors["w"][0]), 3)
      (3.0, 0.8)
    """
    accumulate = plain(accumulate)
    if not is_int(accumulate) or accumulate < 1:
        raise LoraxError(f"accumulate is {shown(accumulate)}; it must be an integer of at least 1.")
    loss_scale = plain(loss_scale)
    if not is_number(loss_scale) or not 0 < loss_scale < float("inf"):
        raise LoraxError(f"loss_scale is {shown(loss_scale)}; it must be a positive number.")
    check_transformation("tx", tx)

    def init(factors: FactorTree, key: Array | None = None) -> State:
        if key is not None:
            check_key(key, "init's key")
        # Copies, because the first step donates them: the caller's factors stay valid, and no buffer is donated twice
        # where an optimiser's state starts as the factors themselves (Prodigy, SAM, L2-SP).
        factors = _copied(dict(factors))
        opt_state = started(tx, factors)
        return State(factors, _copied(opt_state), jnp.zeros((), jnp.int32), None if key is None else jnp.copy(key))

    def step(state: State, base: Params, batch: Any) -> tuple[State, Info]:
        key = None if state.key is None else jax.random.fold_in(state.key, state.step)
        parts, axes = accumulate, frozenset((axis_name,) if isinstance(axis_name, str) else axis_name or ())
        if axis_name is not None:
            parts *= jax.lax.axis_size(axis_name)
        run, place = losses(loss_fn, exact=parts == 1), None if parts == accumulate else jax.lax.axis_index(axis_name)

        def over_batch(run: Run, factors: Any) -> tuple[Array, Any, Any]:
            run = in_parts(run, accumulate, place)
            if axis_name is None:
                return means(run(factors, base, batch, key), factors, parts)
            # Varying factors: of those that all devices share, shard_map's autodiff would sum the gradients itself.
            sums = run(varying(factors, axes), base, batch, key)
            return means(jax.lax.psum(varying(sums, axes), axis_name), factors, parts)

        def value_of(factors: Any) -> Array:
            return over_batch(run, factors)[0]

        def gradient_of(factors: Any) -> Any:
            return over_batch(gradients(run, loss_scale), factors)[2]

        value, aux, grads = over_batch(gradients(run, loss_scale), state.factors)
        norm = optax.tree.norm(jax.tree.map(_at_least_fp32, grads)).astype(jnp.float32)
        measure = value_of if axis_name is None else _with_gradient(value_of, gradient_of)
        extra = extra_arguments(value, grads, measure, gradient_of)
        updates, opt_state = updated(tx, grads, state.opt_state, state.factors, extra)
        factors = optax.apply_updates(state.factors, updates)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        # A rate of infinity makes NaN of finite gradients: the factors themselves count, too.
        finite = jax.tree.reduce(lambda ok, x: ok & jnp.all(jax.lax.is_finite(x)), factors, finite)
        # One bad batch must not spoil the factors: the state stays, and `finite` tells.
        new, old = (factors, opt_state), (state.factors, state.opt_state)
        factors, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        return State(factors, opt_state, state.step + 1, state.key), Info(value, norm, finite, aux)

    return init, jax.jit(step, donate_argnums=(0,)) if jit else step


def _copied(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def _at_least_fp32(x: Array) -> Array:
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def _with_gradient(value_of: Callable[[Any], Array], gradient_of: Callable[[Any], Any]) -> Callable[[Any], Array]:
    """A function whose gradient is given: autodiff through a mean over devices is each device's own."""

    @jax.custom_vjp
    def value_fn(factors: Any) -> Array:
        return value_of(factors)

    value_fn.defvjp(
        lambda factors: (value_of(factors), gradient_of(factors)),
        lambda grads, g: (jax.tree.map(lambda x: (g * x).astype(x.dtype), grads),),
    )
    return value_fn
