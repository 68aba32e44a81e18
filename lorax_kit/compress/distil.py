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

from lorax_kit.compress.arguments import (
    batches_of,
    check_count,
    check_function,
    check_number,
    check_positive,
    scalar_of,
)
from lorax_kit.core.errors import CompressError
from lorax_kit.core.merge import merge, split
from lorax_kit.core.paths import Params, flatten, unflatten
from lorax_kit.core.spec import Full, Spec
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
    for name, fn in (("teacher", teacher), ("loss", loss)):
        check_function(name, fn, "teacher(batch)" if name == "teacher" else "loss(outputs, batch)")

    def mixed(logits: Array, batch: Any) -> Array:
        given = jax.lax.stop_gradient(teacher(batch))
        if given.shape != logits.shape:
            raise CompressError(f"the teacher's logits are {given.shape}, the student's {logits.shape}.")
        wanted = jax.nn.log_softmax(given.astype(jnp.float32) / temperature)
        ours = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
        shares = jnp.exp(wanted)  # a class without any may be masked in both: 0 (-inf + inf) counts nothing
        divergence = jnp.sum(jnp.where(shares > 0, shares * (wanted - jnp.where(shares > 0, ours, 0)), 0), axis=-1)
        counts = jnp.ones(divergence.shape) if weight is None else weight(batch).astype(jnp.float32)
        if counts.shape != divergence.shape:
            raise CompressError(f"the weights are {counts.shape}, the positions {divergence.shape}.")
        mean = jnp.sum(divergence * counts) / jnp.maximum(jnp.sum(counts), 1e-9)
        return (1 - share) * loss(logits, batch) + share * temperature**2 * mean

    return mixed


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
    """Train every parameter of a student; `distillation` makes the loss that follows a teacher.

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
    with tqdm(total=steps, desc="distilling", unit="step", disable=not progress) as bar:
        return trained(fn, params, Spec({"**": Full()}), loss, stream, jax.random.key(0), steps, lr, bar)


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
) -> Params:
    """`steps` steps of AdamW on what the spec trains, merged."""
    first = next(batches, None)
    if first is None:
        raise CompressError("the healing batches ended early.")
    plan = resolve(spec, params, small, first)
    base, factors = split(params, plan, key)
    adapted = adapt(small, plan)
    rate = optax.warmup_cosine_decay_schedule(0.0, lr, warmup := max(steps // 10, 1), max(steps, warmup + 1))
    tx = partition(optax.adamw(rate), plan, clip=1.0)
    init, step = make_step(lambda base, factors, batch: scalar_of(loss, adapted(base, factors, batch), batch), tx)
    state, taken = init(factors), 0
    for taken, batch in enumerate(itertools.islice(itertools.chain([first], batches), steps), 1):
        state, info = step(state, base, batch)
        bar.update()
        if taken % 10 == 1 or taken == steps:
            bar.set_postfix(loss=f"{float(info.loss):.4f}")
            if not bool(info.finite):
                raise CompressError(f"the loss of healing is not finite at step {taken}.\n  lower lr, now {lr:g}")
    if taken < steps:
        raise CompressError(f"the healing batches ended after {bar.n} of {bar.total} steps.")
    merged, (before, treedef) = flatten(merge(base, state.factors, plan))[0], flatten(base)
    untouched = {path: x for path, x in before.items() if path not in plan.trained}  # quantised ones stay so
    return unflatten(merged | untouched, treedef)
