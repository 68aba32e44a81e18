"""`heal`: a compressed model is trained a little, and stays as small as it is.

Low-rank updates of one factor, then of the other, and so on (SVD-LLM, Wang et al., arXiv 2403.07378, section 3.3):
each is merged into its factor, so nothing grows. The loss may follow the original's outputs (Hinton, Vinyals & Dean,
arXiv 1503.02531).
"""

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
    check_key,
    check_number,
    check_positive,
    scalar_of,
)
from lorax_kit.core.compact import LowRank, Quantised
from lorax_kit.core.errors import CompressError
from lorax_kit.core.merge import merge, split
from lorax_kit.core.paths import Params, flatten, paths, unflatten
from lorax_kit.core.spec import Full, LoRA, Spec
from lorax_kit.training import make_step, partition
from lorax_kit.transform import adapt, compressed, resolve

SIDES = ("b", "a")


def heal(
    fn: Callable[..., Any],
    params: Params,
    loss: Callable[[Any, Any], Array],
    batches: Iterable[Any],
    key: Array,
    *,
    steps: int,
    lr: float = 1e-3,
    rank: int | None = 8,
    rounds: int = 2,
    full: tuple[str, ...] = (),
    progress: bool = True,
) -> Params:
    """Train the factors of compressed params, alternately b and a.

    Args:
      fn: `fn(params, batch)`, of dense params.
      params: from `compress`; not changed.
      loss: `loss(outputs, batch)`, a scalar. `distillation` makes one that follows the original.
      batches: as many as `steps`, or more.
      key: random key of the updates.
      steps: in all, shared evenly among the rounds.
      lr: peak rate of AdamW in each round, reached in a tenth of its steps and decaying to 0 as a cosine. Factors
        trained themselves (`rank` None) want a tenth of what low-rank updates want.
      rank: of the updates; at most the rank of the smallest factor counts. None trains the factors themselves.
      rounds: how often the side changes: b, a, b, ... None of it matters where `rank` is None: both train together.
      full: patterns of other parameters to train in full in every round (a head, norms).
      progress: show a bar.

    Returns:
      Params of the same structure, shapes and dtypes.

    Raises:
      CompressError: nothing is low-rank, fewer steps than rounds, batches that end early, a loss that is not finite.
    """
    check_function("fn", fn, "fn(params, batch)")
    small = compressed(fn)
    found = [p for p, x in flatten(params, whole=(LowRank,))[0].items() if isinstance(x, LowRank)]
    if not found:
        raise CompressError("no parameter is low-rank: there is nothing to heal.\n  compress the params first")
    named = flatten(params)[0]
    for path in found:
        if isinstance(named[f"{path}/a"], Quantised) or isinstance(named[f"{path}/b"], Quantised):
            raise CompressError(f"the factors of {path!r} are quantised.\n  heal first, then lk.quantise")
    check_function("loss", loss, "loss(outputs, batch)")
    check_key(key)
    steps, rounds, lr = check_count("steps", steps), check_count("rounds", rounds), check_positive("lr", lr)
    rank = None if rank is None else check_count("rank", rank)
    sides: tuple[tuple[str, ...], ...] = (SIDES,) if rank is None else tuple((SIDES[i % 2],) for i in range(rounds))
    if steps < len(sides):
        raise CompressError(f"{steps} steps do not fill {rounds} rounds.")
    shapes, stream = paths(params), batches_of("the healing batches", batches)
    bar = tqdm(total=steps, desc="healing", unit="step", disable=not progress)
    with bar:
        for i, side in enumerate(sides):
            rules: dict[str, Any] = dict.fromkeys([full] if isinstance(full, str) else full, Full())
            for path in found:
                for name in side:
                    own = f"{path}/{name}"
                    most = min(shapes[own].shape[0], max(shapes[own].shape[1:]))
                    rules[own] = Full() if rank is None else LoRA(rank=min(rank, most), alpha=2 * min(rank, most))
            count = steps * (i + 1) // len(sides) - steps * i // len(sides)
            own_key = jax.random.fold_in(key, i)
            params = _trained(small, params, Spec(rules), loss, stream, own_key, count, lr, bar)
    return params


def _trained(
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
