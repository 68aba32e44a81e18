"""Sums of adapters, exact on their deltas: the rows of the summands side by side (task arithmetic, arXiv 2212.04089).

    sum_i w_i delta_i = [A_1; A_2; ...]^T [w_1 s_1 B_1; w_2 s_2 B_2; ...]

Adding the factors themselves would add A_1^T B_2 and A_2^T B_1, which nobody trained. All of it may be traced, and
differentiated by the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lorax_kit.algebra.adaptation import Adaptation, AnyAdapter, bases, check_number, check_weights, checked, plain
from lorax_kit.algebra.delta import Rows, full_delta, held, rows_of
from lorax_kit.arrays.dtypes import wide
from lorax_kit.core.paths import Params
from lorax_kit.errors import AdapterError


def concatenate(
    adapters: Iterable[AnyAdapter], weights: Sequence[Any] | None = None, *, base: Params | None = None
) -> Adaptation:
    """The weighted sum of deltas, exact to rounding: a plain LoRA whose ranks add up, and whose scale is 1.

    Where ranks add up to more than min(in, out), the sum is held in that many rows. So is the delta of a method with
    gains (DoRA, IA3), which has every rank: `to_lora` cuts it down first, with an error that it says.

    Args:
      adapters: of the same sites; their methods and ranks may differ.
      weights: a number for each, which may be traced; ones by default.
      base: the frozen params; needed by methods whose delta depends on them, and by what is trained in full, whose
        delta is its value less the base.

    Returns:
      The adapter; its `errors` are zeros.

    Raises:
      AdapterError: no adapters, or not of the same sites, shapes and axes; weights of another number, or not finite;
        factors that are not finite; a base that is needed and not given.
      PlanError: a base that does not fit the plan.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1, alpha=4)}), params)
      >>> one, two = (Adaptation(plan, {"w": lk.Factors(jnp.ones((1, 4)), jnp.full((1, 3), x))}) for x in (1.0, 10.0))
      >>> both = concatenate([one, two], [1.0, 0.5])
      >>> both.plan.site("w").rank, float(lk.merge(params, both.factors, both.plan)["w"][0, 0])
      (2, 25.0)
    """
    listed = checked(adapters)
    numbers = check_weights(weights, len(listed))
    named = bases(listed[0], base)
    rows = {}
    for i, site in enumerate(listed[0].plan.sites):
        pairs = [rows_of(a.plan.sites[i], named.get(site.path), a.factors[site.path]) for a in listed]
        dtype = wide(*(x.dtype for rows in pairs for x in rows))
        a = jnp.concatenate([x.a.astype(dtype) for x in pairs])
        b = jnp.concatenate([jnp.asarray(w, dtype) * x.b.astype(dtype) for x, w in zip(pairs, numbers, strict=True)])
        rows[site.path] = held(site, Rows(a, b))
    full = {}
    for leaf in listed[0].plan.full:
        deltas = [full_delta(leaf, adapter, named) for adapter in listed]
        start = jnp.asarray(named[leaf.path])
        full[leaf.path] = moved(start, [jnp.asarray(w, d.dtype) * d for w, d in zip(numbers, deltas, strict=True)])
    return plain([adapter.plan for adapter in listed], rows, full)


def moved(start: Array, deltas: Sequence[Array]) -> Array:
    """A parameter and the sum of its deltas, in at least fp32."""
    dtype = wide(start.dtype, *(d.dtype for d in deltas))
    return start.astype(dtype) + sum((d.astype(dtype) for d in deltas[1:]), deltas[0].astype(dtype))


def scale(adapter: AnyAdapter, x: Any, *, base: Params | None = None) -> Adaptation:
    """An adapter whose delta is `x` times as large; all else as `concatenate`.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params)
      >>> half = scale(Adaptation(plan, {"w": lk.Factors(jnp.ones((1, 4)), jnp.ones((1, 3)))}), 0.5)
      >>> float(lk.merge(params, half.factors, half.plan)["w"][0, 0])
      1.5
    """
    return concatenate([adapter], [check_number("the factor", x)], base=base)


def negate(adapter: AnyAdapter, *, base: Params | None = None) -> Adaptation:
    """An adapter that takes off what `adapter` adds: it unlearns the task; all else as `concatenate`."""
    return concatenate([adapter], [-1.0], base=base)


def add(*adapters: AnyAdapter, base: Params | None = None) -> Adaptation:
    """The sum of deltas; all else as `concatenate`."""
    return concatenate(adapters, base=base)


def subtract(one: AnyAdapter, other: AnyAdapter, *, base: Params | None = None) -> Adaptation:
    """The delta of one less that of the other; all else as `concatenate`."""
    return concatenate([one, other], [1.0, -1.0], base=base)


def average(
    adapters: Iterable[AnyAdapter], weights: Sequence[Any] | None = None, *, base: Params | None = None
) -> Adaptation:
    """The weighted mean of deltas; all else as `concatenate`.

    Args:
      weights: divided by their sum; equal ones by default.

    Raises:
      AdapterError: as `concatenate`; weights whose sum is zero.
    """
    listed = checked(adapters)
    numbers = check_weights(weights, len(listed))
    traced = any(isinstance(x, jax.core.Tracer) for x in numbers)
    total = sum(numbers) if traced else fsum(numbers)
    if not traced and total == 0:
        raise AdapterError(f"the weights {numbers} add up to zero: there is no mean.\n  for a sum: concatenate")
    return concatenate(listed, [x / total for x in numbers], base=base)
