"""What the inputs of each site look like: sums over calibration batches, one pass, in memory that does not grow.

The function is traced as `lk.resolve` traces it. Where a parameter is multiplied, its input passes through an
identity whose derivative rule returns sum x x^T as the cotangent of an argument of its own: JAX's backward pass then
adds up all uses, all steps of a scan and the taken branch of a cond. Nothing else of the backward pass is needed, and
XLA drops it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from tqdm import tqdm

from lorax_kit.core.compact import dense
from lorax_kit.core.errors import CompressError
from lorax_kit.core.merge import check_params
from lorax_kit.core.paths import Params, flatten, unflatten
from lorax_kit.core.plan import Plan, Site
from lorax_kit.transform.interpret import Context
from lorax_kit.transform.trace import run
from lorax_kit.transform.weight import Weight, whole


class Moments(NamedTuple):
    """Sums over the calibration data of one site, S its stacked matrices (1 without a stack), K its inputs.

    Attributes:
      tokens: how many inputs were summed.
      gram: (S, K, K) sum of x x^T; None for a table.
      absolute: (S, K) mean of |x|; None for a table.
      counts: (V,) how often each row of a table was looked up; None for a product.
      fisher: (S, K) mean over batches of the squared gradients, summed over the outputs; None without a loss.
    """

    tokens: float
    gram: np.ndarray | None = None
    absolute: np.ndarray | None = None
    counts: np.ndarray | None = None
    fisher: np.ndarray | None = None


Stats = Mapping[str, Moments]


def moments_of(stats: Stats | None, path: str, method: str) -> Moments:
    """Those of a site, for a method that needs them.

    Raises:
      CompressError: there are none.
    """
    if stats is None or path not in stats:
        raise CompressError(f"{method!r} needs calibration data for {path!r}.\n  stats = lk.compress.calibrate(...)")
    return stats[path]


class _Sums(NamedTuple):
    """On the device: tokens (), second (S, K, K) or counts (V,), first (S, K) of |x|."""

    tokens: Array
    second: Array
    first: Array


@jax.custom_vjp
def _tapped(inputs: Partial, value: Array, sums: _Sums) -> Array:
    """`value`; the cotangent of `sums` is the sums over `inputs(value)`."""
    return value


def _tapped_fwd(inputs: Partial, value: Array, sums: _Sums) -> tuple[Array, tuple[Partial, Array, _Sums]]:
    return value, (inputs, value, sums)


def _tapped_bwd(residuals: tuple[Partial, Array, _Sums], g: Array) -> tuple[None, Array, _Sums]:
    inputs, value, sums = residuals
    x = inputs(value)
    if jnp.issubdtype(x.dtype, jnp.integer):
        counts = jnp.zeros_like(sums.second).at[x].add(1.0, mode="drop")
        found = _Sums(jnp.asarray(x.size, jnp.float32), counts, jnp.zeros_like(sums.first))
    else:
        x = x.astype(jnp.float32).reshape(-1, *x.shape[-2:])
        second = jnp.einsum("smi,smj->sij", x, x, precision=jax.lax.Precision.HIGHEST)
        found = _Sums(jnp.asarray(x.shape[1], jnp.float32), second, jnp.sum(jnp.abs(x), axis=1))
    return None, jnp.zeros_like(g), found


_tapped.defvjp(_tapped_fwd, _tapped_bwd)


def _layer(sums: _Sums, i: Array) -> _Sums:
    """Of one of the stacked matrices; its tokens count for their mean."""
    second, first = (jax.lax.dynamic_slice_in_dim(x, i, 1) for x in (sums.second, sums.first))
    return _Sums(sums.tokens / len(sums.second), second, first)


def _zeros(site: Site) -> _Sums:
    s, k = prod(site.stack_shape), prod(site.in_shape)
    if site.lookup:
        return _Sums(jnp.zeros(()), jnp.zeros((k,)), jnp.zeros((0,)))
    return _Sums(jnp.zeros(()), jnp.zeros((s, k, k)), jnp.zeros((s, k)))


def calibrate(
    fn: Callable[..., Any],
    params: Params,
    plan: Plan,
    batches: Iterable[Any],
    *,
    loss: Callable[[Any, Any], Array] | None = None,
    progress: bool = True,
) -> dict[str, Moments]:
    """Sum what the sites of `plan` are given over calibration batches.

    Args:
      fn: `fn(params, batch)`, traceable by JAX.
      params: dense, or compressed in other places (`fn` is then `lk.compress.compressed(fn)`).
      plan: from `lk.resolve`; which parameters, and what their inputs are. Ranks do not matter.
      batches: each of one shape, or of few: a program is compiled for each shape.
      loss: `loss(fn(params, batch), batch)`, a scalar: sum its squared gradients, too, for "fisher".
      progress: show a bar.

    Returns:
      Moments by path, float64 on the host. Beyond params and one batch's activations it takes 8 K^2 bytes for each
      site of K inputs on the device, and as much on the host.

    Raises:
      CompressError: no batches; a site whose inputs no batch reached, or only in ways that have no rule.

    Example:
      >>> import lorax_kit as lk
      >>> params, x = {"w": jnp.ones((3, 2))}, jnp.arange(12.0).reshape(4, 3)
      >>> fn = lambda p, x: x @ p["w"]
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params, fn, x)
      >>> moments = calibrate(fn, params, plan, [x, x], progress=False)["w"]
      >>> moments.tokens, moments.gram[0, 0].tolist()
      (8.0, [252.0, 288.0, 324.0])
    """
    named, treedef = flatten(params)
    check_params(named, plan)
    sites = {site.path: site for site in plan.sites}
    skipped: dict[str, str] = {}

    def taps(
        sums: Mapping[str, _Sums], weight: Weight, dims: tuple[tuple[int, ...], ...], x: Array, inputs: Any
    ) -> Any:
        contract, free, stack = dims
        for part in weight.parts:
            site = sites[part.path]
            axes = part.axes(contract, free)
            sizes = [prod(weight.shape[d] for d in some) for some in (contract, stack)]
            if part.altered:
                skipped[part.path] = f"it goes through {part.altered!r} before it is multiplied"
            elif axes is None or axes.inputs != site.axes.inputs:
                skipped[part.path] = "it is multiplied along other axes than the plan's inputs"
            elif sizes == [prod(site.in_shape), 1] and weight.layer is not None:
                x = _tapped(inputs, x, _layer(sums[part.path], weight.layer))
            elif sizes != [prod(site.in_shape), prod(site.stack_shape)]:
                skipped[part.path] = "a part of it is used alone, as a slice, or a layer picked by its index"
            else:
                x = _tapped(inputs, x, sums[part.path])
        return x

    def forward(sums: Mapping[str, _Sums], named: Mapping[str, Any], batch: Any) -> Array:
        probes = {p: Weight(parts=(whole(p, sites[p].shape),), w=dense(named[p])) for p in sites}
        out = run(Context(tap=partial(taps, sums)), fn, named, treedef, probes, (batch,), {})
        floats = [x for x in jax.tree.leaves(out) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
        return sum((jnp.sum(x.astype(jnp.float32)) for x in floats), jnp.zeros(()))

    @partial(jax.jit, donate_argnums=0)
    def add(sums: dict[str, _Sums], arrays: dict[str, Array], batch: Any) -> dict[str, _Sums]:
        found = jax.grad(forward)(sums, {**named, **arrays}, batch)
        return jax.tree.map(jnp.add, sums, found)

    @jax.jit
    def squares(arrays: dict[str, Array], batch: Any) -> dict[str, Array]:
        assert loss is not None

        def value(own: dict[str, Array]) -> Array:
            return loss(fn(unflatten({**named, **arrays, **own}, treedef), batch), batch)

        own = {p: dense(arrays[p]) for p in sites}
        return {p: jnp.sum(matrices(g, sites[p]) ** 2, axis=-1) for p, g in jax.grad(value)(own).items()}

    arrays = {p: x for p, x in named.items() if hasattr(x, "shape")}
    sums = {p: _zeros(site) for p, site in sites.items()}
    fisher = {p: np.zeros((prod(s.stack_shape), prod(s.in_shape))) for p, s in sites.items()}
    n = 0
    for batch in tqdm(batches, desc="calibration", disable=not progress):
        if any(0 in jnp.shape(x) for x in jax.tree.leaves(batch)):
            raise CompressError(f"calibration batch {n + 1} is empty.")
        sums = add(sums, arrays, batch)
        if loss is not None:
            for path, x in squares(arrays, batch).items():
                fisher[path] += np.asarray(x, np.float64)
        n += 1
    if n == 0:
        raise CompressError("there are no calibration batches.")
    found = {p: _moments(sites[p], sums[p], fisher[p] / n if loss is not None else None) for p in sites}
    for path, moments in found.items():
        if path in skipped and moments.tokens > 0:
            raise CompressError(
                f"calibration knows some uses of {path!r}, but not all: {skipped[path]}.\n"
                "  leave it out of the plan, or use 'svd'"
            )
        if moments.tokens == 0:
            why = skipped.get(path, "no product or lookup of it leads to a float output")
            raise CompressError(f"calibration never reached {path!r}: {why}.\n  leave it out of the plan, or use 'svd'")
    return found


def matrices(x: Array, site: Site) -> Array:
    """A parameter as (S, K, N)."""
    axes = site.axes
    x = jnp.transpose(x, (*axes.stack, *axes.inputs, *axes.outputs))
    return x.reshape(prod(site.stack_shape), prod(site.in_shape), prod(site.out_shape))


def from_matrices(x: Array, site: Site) -> Array:
    """(S, K, N) as the parameter: the inverse of `matrices`."""
    order = (*site.axes.stack, *site.axes.inputs, *site.axes.outputs)
    x = x.reshape(*site.stack_shape, *site.in_shape, *site.out_shape)
    return jnp.transpose(x, [order.index(i) for i in range(len(order))])


def _moments(site: Site, sums: _Sums, fisher: np.ndarray | None) -> Moments:
    tokens, second, first = (np.asarray(x, np.float64) for x in sums)
    if site.lookup:
        return Moments(float(tokens), counts=second, fisher=fisher)
    return Moments(float(tokens), gram=second, absolute=first / max(float(tokens), 1.0), fisher=fisher)
