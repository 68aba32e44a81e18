"""`distil`: a smaller model learns from a larger one, the baseline of every compression; and the loss it learns by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from tqdm import tqdm

from lorax_kit.calibration.arguments import batches_of, check_function, scalar_of, shown
from lorax_kit.compress.arguments import check_count, check_number, check_positive
from lorax_kit.core.merge import merge, split
from lorax_kit.core.paths import Params, arrays_only, flatten, is_array, unflatten
from lorax_kit.core.plan import Plan
from lorax_kit.core.specs.patterns import literal
from lorax_kit.core.specs.setting import Full
from lorax_kit.core.specs.spec import Spec
from lorax_kit.errors import CompressError
from lorax_kit.training import make_step, partition
from lorax_kit.transform import adapt, resolve


def distillation(
    teacher: Callable[[Any], Array],
    loss: Callable[[Any, Any], Array],
    *,
    weight: Callable[[Any], Array] | None = None,
    share: float = 0.5,
    temperature: float = 2.0,
) -> Callable[[Any, Any], Array]:
    """A loss that mixes `loss` with the divergence from a teacher's distribution.

    (1 - share) loss + share T^2 KL(teacher / T || logits / T), a mean over the batch's positions.

    Args:
      teacher: batch -> logits (..., C); no gradient passes it.
      weight: batch -> (...), how much each position counts; default all alike.
    """
    if check_number("share", share, 0.0) > 1 or check_number("temperature", temperature, 0.0) == 0:
        raise CompressError(
            f"share is {share!r} and temperature {temperature!r}; share in [0, 1], temperature above 0."
        )
    check_function("teacher", teacher, "teacher(batch)")
    check_function("loss", loss, "loss(outputs, batch)")
    if weight is not None:
        check_function("weight", weight, "weight(batch)")

    def mixed(logits: Array, batch: Any) -> Array:
        given = jax.lax.stop_gradient(_floats("teacher", teacher(batch)))
        if given.shape != logits.shape:
            raise CompressError(f"the teacher's logits are {given.shape}, the student's {logits.shape}.")
        wanted = jax.nn.log_softmax(given.astype(jnp.float32) / temperature)
        ours = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
        shares = jnp.exp(wanted)  # a class without any may be masked in both: 0 (-inf + inf) counts nothing
        some = ~(shares <= 0)  # NaN is not left out
        divergence = jnp.sum(jnp.where(some, shares * (wanted - jnp.where(some, ours, 0)), 0), axis=-1)
        counts = jnp.ones(divergence.shape)
        if weight is not None:
            counts = _floats("weight", weight(batch)).astype(jnp.float32)
        if counts.shape != divergence.shape:
            raise CompressError(f"the weights are {counts.shape}, the positions {divergence.shape}.")
        mean = jnp.sum(divergence * counts) / jnp.maximum(jnp.sum(counts), 1e-9)
        return (1 - share) * loss(logits, batch) + share * temperature**2 * mean

    return mixed


def _floats(name: str, x: Any) -> Array:
    if not is_array(x):
        raise CompressError(f"{name}(batch) is {shown(x)}; it must be an array.")
    return jnp.asarray(x)


def distil(
    fn: Callable[..., Any],
    params: Params,
    loss: Callable[[Any, Any], Array],
    batches: Iterable[Any],
    *,
    steps: int,
    lr: float = 1e-4,
    progress: bool = True,
) -> Params:
    """Train the float parameters that a student uses; `distillation` makes the loss that follows a teacher.

    Args:
      fn: `fn(params, batch)`, the student.
      params: where it starts, such as some of the teacher's layers; not changed.
      loss: `loss(outputs, batch)`, a scalar.
      batches: as many as `steps`, or more.
      steps: of AdamW.
      lr: its peak rate, reached in a tenth of the steps and decaying to 0 as a cosine.
      progress: show a bar.

    Raises:
      CompressError: no steps, a rate that is no positive number, batches that end early, a loss that is not finite.
    """
    check_function("fn", fn, "fn(params, batch)")
    check_function("loss", loss, "loss(outputs, batch)")
    steps, lr, stream = check_count("steps", steps), check_positive("lr", lr), batches_of("the batches", batches)
    first = next(stream, None)
    if first is None:
        raise CompressError("there are no batches.")
    spec = Spec({literal(path): Full() for path in _used(fn, params, first)})
    stream = itertools.chain([first], stream)
    with tqdm(total=steps, desc="distilling", unit="step", disable=None if progress else True) as bar:
        return trained(fn, params, spec, loss, stream, jax.random.key(0), steps, lr, bar)


def _used(fn: Callable[..., Any], params: Params, batch: Any) -> list[str]:
    """Paths of the float arrays that `fn` reads."""
    named, treedef = flatten(params)
    floats = {path: x for path, x in named.items() if is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)}

    def call(own: dict[str, Any], batch: Any) -> Any:
        return fn(unflatten({**named, **own}, treedef), batch)

    jaxpr = jax.make_jaxpr(call)(floats, batch).jaxpr
    read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
    return [path for path, v in zip(sorted(floats), jaxpr.invars[: len(floats)], strict=True) if id(v) in read]


def trained(
    small: Callable[..., Any],
    params: Params,
    spec: Spec,
    loss: Callable[[Any, Any], Array],
    batches: Iterator[Any],
    key: Array,
    steps: int,
    lr: float,
    bar: Any,
    under: Callable[[Params], Params] | None = None,
    begun: int = 0,
) -> Params:
    """`steps` steps of AdamW on what the spec trains, merged.

    Args:
      bar: shows all steps, of which this training is `steps` after the first `begun`.
      under: what holds of the params at every step and in the end, such as zeros that stay; None: nothing.
    """
    first = next(batches, None)
    if first is None:
        raise CompressError(f"the batches ended after {begun} of {bar.total} steps.")
    plan = resolve(spec, params, small, first)
    base, factors = split(params, plan, key)
    adapted = adapt(small, plan) if under is None else _held(small, plan, under)
    arrays, whole = arrays_only(base)
    warmup = max(steps // 10, 1)
    rate = optax.warmup_cosine_decay_schedule(lr / warmup, lr, warmup, max(steps, warmup + 1))  # no step of rate 0
    tx = partition(optax.adamw(rate), plan, clip=1.0)

    def value(arrays: Any, factors: Any, batch: Any) -> Array:
        return scalar_of(loss, adapted(whole(arrays), factors, batch), batch)

    init, step = make_step(value, tx)
    state, taken, finite = init(factors), 0, jnp.asarray(True)
    for taken, batch in enumerate(itertools.islice(itertools.chain([first], batches), steps), 1):
        state, info = step(state, arrays, batch)
        bar.update()
        finite &= info.finite
        if taken % 10 == 1 or taken == steps:
            bar.set_postfix(loss=f"{float(info.loss):.4f}")
            if not bool(finite):
                raise CompressError(
                    f"the loss or its gradient was not finite by step {begun + taken}.\n"
                    f"  check params and batches, or lower lr, now {lr:g}"
                )
    if taken < steps:
        raise CompressError(f"the batches ended after {begun + taken} of {bar.total} steps.")
    trained_params = merge(base, state.factors, plan)
    merged, (before, treedef) = flatten(trained_params if under is None else under(trained_params))[0], flatten(base)
    untouched = {path: x for path, x in before.items() if path not in plan.trained}  # quantised ones stay so
    return unflatten(merged | untouched, treedef)


def _held(fn: Callable[..., Any], plan: Plan, under: Callable[[Params], Params]) -> Callable[..., Any]:
    """The function of (base, factors, batch) whose params are what `under` makes of the merged ones."""
    return lambda base, factors, batch: fn(under(merge(base, factors, plan)), batch)
