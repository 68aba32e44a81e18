"""One batch, an adapter for each of its rows: the base product is one for all rows, and only the thin ones are per row.

`jax.vmap` over the rows, with the factors of each row's adapter mapped and the base not: a product of the base with
mapped inputs is one product of all rows, and the low-rank ones are products in batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.algebra.adaptation import planned
from lorax_kit.algebra.stack import Stacked
from lorax_kit.core.leaves import FullLeaf
from lorax_kit.core.merge import check_params
from lorax_kit.core.method import Update
from lorax_kit.core.paths import Params, flatten, is_array
from lorax_kit.core.plan import Plan
from lorax_kit.errors import AdapterError, PlanError
from lorax_kit.transform.base import base_of
from lorax_kit.transform.context import Context
from lorax_kit.transform.cost import measured_costs
from lorax_kit.transform.trace import run
from lorax_kit.transform.weight import Weight, frozen_weights, make_weight


@dataclass(frozen=True)
class PerRow:
    """A function of (base, factors, *inputs, which=...); made by `per_row`."""

    fn: Callable[..., Any]
    plan: Plan

    def __repr__(self) -> str:
        return f"per_row({getattr(self.fn, '__qualname__', type(self.fn).__name__)})"

    def __call__(self, base: Params, factors: dict[str, Any], *inputs: Any, which: Any = None, **shared: Any) -> Any:
        """`fn`, each row of the inputs with the adapter that `which` names; without it, row i with adapter i."""
        named, treedef = flatten(base)
        check_params(named, self.plan)
        count = self._count(factors)
        leaves, tree = jax.tree.flatten(inputs)
        mapped = [i for i, x in enumerate(leaves) if is_array(x)]
        shapes = {tuple(leaves[i].shape) for i in mapped}
        index = _indices(np.arange(count) if which is None else which, count, shapes)

        def row(index: Array, row_factors: dict[str, Any] | None, arrays: list[Array]) -> Any:
            values = list(leaves)
            for i, x in zip(mapped, arrays, strict=True):
                values[i] = x
            given = jax.tree.unflatten(tree, values)
            if row_factors is None:
                return self._row(named, treedef, factors, count, index, given, shared)
            return self._row(named, treedef, row_factors, 1, None, given, shared)

        # `fn` is given batches of one row. Without `which` the factors are mapped as they lie, and none is copied.
        arrays = [jnp.asarray(leaves[i])[:, None] for i in mapped]
        out = jax.vmap(row)(index, factors if which is None else None, arrays)
        return jax.tree.map(lambda x: x[:, 0] if x.ndim > 1 and x.shape[1] == 1 else x, out)

    def _row(
        self,
        named: dict[str, Any],
        treedef: Any,
        factors: dict[str, Any],
        count: int,
        index: Array | None,
        inputs: Any,
        shared: Any,
    ) -> Any:
        """`fn` with the adapter at `index`, () int; None: with the one that `factors` hold."""
        # An index out of range that only a compiled program sees makes its row NaN; another's adapter it never gets.
        inside = jnp.bool_(True) if index is None else (index >= 0) & (index < count)
        scale = jnp.float32(1) if index is None else jnp.where(inside, jnp.float32(1), jnp.float32(jnp.nan))

        def own(x: Array) -> Array:
            if index is None:
                return x
            return jnp.where(inside, jnp.take(x, index, axis=0, mode="clip"), jnp.asarray(jnp.nan, x.dtype))

        params = dict(named)
        for leaf in self.plan.full:
            params[leaf.path] = own(factors[leaf.path].value).astype(named[leaf.path].dtype)
        weights: dict[str, Weight] = {}
        for site in self.plan.sites:
            a, b, *gains = factors[site.path]
            # Rows of all adapters, one after the other, are those of one weight until a product takes its own: what
            # is copied lives for that product only, where copies for all sites at the start would fill the memory.
            rows = (a, b) if index is None else (x.reshape(-1, *x.shape[2:]) for x in (a, b))
            update = Update(*rows, *jax.tree.map(own, gains))
            weight = make_weight(site, base_of(named[site.path]), update, scale, None)
            weights[site.path] = weight if index is None else replace(weight, adapter=index, adapters=count)
        weights |= frozen_weights(params, weights)
        ctx = Context(
            kernel="factored",
            trials=count,
            compute_dtype=self.plan.compute_dtype,
            costs=measured_costs(jax.default_backend()),
        )
        out = run(ctx, self.fn, params, treedef, weights, inputs, shared)
        unused = {site.path for site in self.plan.sites} - {use.path for use in ctx.uses.values()}
        if unused:
            raise PlanError(
                f"the function does not use {min(unused)!r} for these inputs, though an adapter adapts it.\n"
                "  call it with the inputs that the specs were resolved with"
            )
        return out

    def _count(self, factors: Any) -> int:
        """How many adapters the factors hold.

        Raises:
          AdapterError: they are not those of the stack.
        """
        for one in planned(self.plan):
            leaves = factors.get(one.path) if isinstance(factors, dict) else None
            if not isinstance(leaves, Update | FullLeaf):
                raise AdapterError(
                    f"the factors hold nothing stacked at {one.path!r}: they are not those of this stack.\n"
                    "  call batched(base, stacked.factors, *inputs, which=which)"
                )
        return int(jax.tree.leaves(factors)[0].shape[0])


def _indices(which: Any, count: int, shapes: set[tuple[int, ...]]) -> Array:
    """`which` as (rows,) int.

    Raises:
      AdapterError: it is no list of integers, of another length than the inputs, or out of range (where it is known).
    """
    index = which if is_array(which) else np.asarray(which)
    if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise AdapterError(
            f"which has shape {tuple(index.shape)} and dtype {index.dtype}; it must be integers, one for each row."
        )
    for shape in sorted(shapes):
        if not shape or shape[0] != len(index):
            raise AdapterError(
                f"which names adapters for {len(index)} rows, an input has shape {shape}.\n"
                "  every positional input has the rows first; what all rows share is given by keyword"
            )
    if not isinstance(index, jax.core.Tracer) and len(index):
        low, high = int(np.min(index)), int(np.max(index))
        if low < 0 or high >= count:
            raise AdapterError(f"which holds {low if low < 0 else high}; the stack has adapters 0 to {count - 1}.")
    return jnp.asarray(index)


def rows_of(stacked: Stacked, which: Any) -> dict[str, Any]:
    """Factors with an adapter for each row, for `per_row` without `which`: copied once, where a loop calls it often.

    Args:
      stacked: from `stack`.
      which: (rows,) int, for each row the index of its adapter.

    Raises:
      AdapterError: `which` is no list of integers, or out of range.

    Example:
      >>> import lorax_kit as lk
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), {"w": jnp.ones((4, 3))})
      >>> adapter = lk.algebra.Adaptation(plan, {"w": lk.Factors(jnp.ones((1, 4)), jnp.ones((1, 3)))})
      >>> stacked = lk.algebra.stack([None, adapter], base={"w": jnp.ones((4, 3))})
      >>> rows_of(stacked, [1, 0, 1])["w"].a.shape
      (3, 1, 4)
    """
    index = _indices(which, stacked.size, set())
    return jax.tree.map(lambda x: x[index], stacked.factors)


def per_row(fn: Callable[..., Any], stacked: Stacked) -> PerRow:
    """Run any JAX function on a batch of which each row has its own adapter, of its own rank and method.

    Args:
      fn: `fn(params, *inputs, **shared)`, traceable by JAX; it is not changed. It is called with batches of one row.
      stacked: from `stack`; only its plan is read here.

    Returns:
      `batched(base, stacked.factors, *inputs, which=which, **shared)`, to be used under `jit` and `grad`. Each array
      among the inputs has the rows first; `which` (rows,) holds for each the index of its adapter in the stack. Without
      it row i has adapter i, whose factors are read where they lie; see `rows_of`. Keyword arguments reach `fn` as they
      are, the same for all rows. Outputs have the rows first, and each row is what `lk.adapt` gives for it alone. Where
      `fn` needs all rows at once (statistics of a batch), it sees one.

      `which` is checked where it is known. In a compiled program it is not, and a row whose index is out of range comes
      out as NaN.

    Raises:
      AdapterError: when called, factors of another stack, `which` of another length or out of range.
      PlanError: when called, a base or a use that does not fit.

    Example:
      >>> import lorax_kit as lk
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> f = lambda p, x: x @ p["w"]
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params, f, x)
      >>> adapter = lk.algebra.Adaptation(plan, {"w": lk.Factors(jnp.ones((1, 4)), jnp.ones((1, 3)))})
      >>> stacked = lk.algebra.stack([None, adapter], base=params)
      >>> per_row(f, stacked)(params, stacked.factors, x, which=[1, 0]).tolist()
      [[8.0, 8.0, 8.0], [4.0, 4.0, 4.0]]
    """
    if not isinstance(stacked, Stacked):
        raise AdapterError(
            f"a {type(stacked).__name__} is no stack of adapters; make one: lk.algebra.stack([...], base=base)"
        )
    return PerRow(fn, stacked.plan)
