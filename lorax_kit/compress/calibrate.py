"""What the inputs of each site look like: sums over calibration batches, one pass, in memory that does not grow.

The function is traced as `lk.resolve` traces it. Where a parameter is multiplied, sum x x^T of its input is added to
a mutable array of the program (`jax.new_ref`), in whatever scan, while loop or branch that happens. Nothing is
differentiated, and XLA drops what follows the last input.
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
from tqdm import tqdm

from lorax_kit.compress.arguments import batches_of, check_function, planned, scalar_of, shown
from lorax_kit.core.compact import dense
from lorax_kit.core.errors import CompressError
from lorax_kit.core.paths import Params, is_array, unflatten
from lorax_kit.core.plan import Plan, Site
from lorax_kit.transform.context import Context
from lorax_kit.transform.interpret import run
from lorax_kit.transform.weight import Part, Weight, whole


class Moments(NamedTuple):
    """Sums over the calibration data of one site, S its stacked matrices (1 without a stack), K its inputs.

    Attributes:
      tokens: how many inputs were summed.
      gram: (S, K, K) sum of x x^T; None for a table.
      absolute: (S, K) mean of |x|; None for a table.
      counts: (V,) how often each row of a table was looked up; None for a product.
      fisher: (S, K) mean of the squared gradients over batches and outputs; None without a loss. A mean, so that sites
        of many outputs do not count for more: the loss rises by about half of sum_k fisher_k sum_n (dW_kn)^2.
    """

    tokens: float
    gram: np.ndarray | None = None
    absolute: np.ndarray | None = None
    counts: np.ndarray | None = None
    fisher: np.ndarray | None = None

    @property
    def squares(self) -> np.ndarray | None:
        """(S, K) sum of x_k^2; of a table (1, V), how often each row was looked up."""
        if self.counts is not None:
            return self.counts[None]
        return None if self.gram is None else np.diagonal(self.gram, axis1=1, axis2=2)


Stats = Mapping[str, Moments]


def moments_of(stats: Stats | None, path: str, method: str) -> Moments:
    """Those of a site, for a method that needs them.

    Raises:
      CompressError: there are none.
    """
    if stats is not None and not isinstance(stats, Mapping):
        raise CompressError(f"stats are {shown(stats)}; they must be what lk.compress.calibrate returns.")
    if stats is None or path not in stats:
        raise CompressError(f"{method!r} needs calibration data for {path!r}.\n  stats = lk.compress.calibrate(...)")
    if not isinstance(found := stats[path], Moments):
        raise CompressError(f"the stats of {path!r} are {shown(found)}; lk.compress.calibrate makes them.")
    return found


def check_finite(x: Any, path: str) -> None:
    """Raise `CompressError` if moments of a site are not finite; None is."""
    if x is not None and not np.isfinite(x).all():
        raise CompressError(
            f"the calibration data of {path!r} are not finite: an input or gradient was, or sums overflowed.\n"
            "  check the params and the batches"
        )


class _Sums(NamedTuple):
    """On the device: tokens (), second (S, K, K) or counts (V,), first (S, K) of |x|; arrays, or `jax.Ref`s of them."""

    tokens: Any
    second: Any
    first: Any


def _zeros(site: Site) -> _Sums:
    s, k = prod(site.stack_shape), prod(site.in_shape)
    if site.lookup:
        return _Sums(jnp.zeros(()), jnp.zeros((k,)), jnp.zeros((0,)))
    return _Sums(jnp.zeros(()), jnp.zeros((s, k, k)), jnp.zeros((s, k)))


def _count_rows(sums: _Sums, rows: Array) -> None:
    sums.second[...] = sums.second[...].at[rows].add(1.0, mode="drop")
    sums.tokens[...] += jnp.float32(rows.size)


def _add_inputs(sums: _Sums, x: Array, layer: Array | None) -> None:
    """Add x (*S, M, K), or (M, K) of one of the stacked matrices, whose tokens count for the mean of all."""
    x = x.astype(jnp.float32).reshape(-1, *x.shape[-2:])
    second = jnp.einsum("smi,smj->sij", x, x, precision=jax.lax.Precision.HIGHEST)
    first, tokens = jnp.sum(jnp.abs(x), axis=1), jnp.float32(x.shape[1])
    if layer is None:
        sums.second[...] += second
        sums.first[...] += first
        sums.tokens[...] += tokens
    else:
        sums.second[layer] += second[0]
        sums.first[layer] += first[0]
        sums.tokens[...] += tokens / sums.first.shape[0]


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
    check_function("fn", fn, "fn(params, batch)")
    if loss is not None:
        check_function("loss", loss, "loss(fn(params, batch), batch)")
    named, treedef = planned(params, plan)
    sites = {site.path: site for site in plan.sites}
    skipped: dict[str, str] = {}

    def taps(
        sums: Mapping[str, _Sums], weight: Weight, dims: tuple[tuple[int, ...], ...], x: Array, inputs: Any
    ) -> Array:
        for part in weight.parts:
            site = sites[part.path]
            if why := _refused(site, part, weight, dims):
                skipped[part.path] = why
                continue
            found = inputs(x)
            rows = jnp.issubdtype(found.dtype, jnp.integer) and found.ndim == 1
            if rows != site.lookup:
                skipped[part.path] = "its rows are looked up in one place, and multiplied in another"
            elif rows:
                _count_rows(sums[part.path], found)
            else:
                _add_inputs(sums[part.path], found, weight.layer)
        return x

    @partial(jax.jit, donate_argnums=0)
    def add(sums: dict[str, _Sums], arrays: dict[str, Array], batch: Any) -> dict[str, _Sums]:
        refs = jax.tree.map(jax.new_ref, sums)
        own = {**named, **arrays}
        probes = {p: Weight(parts=(whole(p, sites[p].shape),), w=dense(own[p])) for p in sites}
        run(Context(tap=partial(taps, refs)), fn, own, treedef, probes, (batch,), {})
        return jax.tree.map(jax.freeze, refs)

    @jax.jit
    def squares(arrays: dict[str, Array], batch: Any) -> dict[str, Array]:
        assert loss is not None

        def value(own: dict[str, Array]) -> Array:
            return scalar_of(loss, fn(unflatten({**named, **arrays, **own}, treedef), batch), batch)

        own = {p: dense(arrays[p]) for p in sites}
        return {p: jnp.mean(matrices(g, sites[p]) ** 2, axis=-1) for p, g in jax.grad(value)(own).items()}

    arrays = {p: x for p, x in named.items() if is_array(x)}
    sums = {p: _zeros(site) for p, site in sites.items()}
    fisher = {p: np.zeros((prod(s.stack_shape), prod(s.in_shape))) for p, s in sites.items()}
    n = 0
    for batch in tqdm(batches_of("the calibration batches", batches), desc="calibration", disable=not progress):
        if any(0 in jnp.shape(x) for x in jax.tree.leaves(batch)):
            raise CompressError(f"calibration batch {n + 1} is empty.")
        sums = add(sums, arrays, batch)
        if loss is not None:
            for path, x in _differentiated(squares, arrays, batch).items():
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
            why = skipped.get(path, "no batch led to a product or lookup of it")
            raise CompressError(f"calibration never reached {path!r}: {why}.\n  leave it out of the plan, or use 'svd'")
        for sum_ in moments:
            check_finite(sum_, path)
    return found


def _refused(site: Site, part: Part, weight: Weight, dims: tuple[tuple[int, ...], ...]) -> str:
    """Why the inputs of a use are not those of the site, or cannot be summed; "" where they can."""
    contract, free, stack = dims
    axes = part.axes(contract, free)
    sizes = [prod(weight.shape[d] for d in some) for some in (contract, stack)]
    if part.altered:
        return f"it goes through {part.altered!r} before it is multiplied"
    if jax.sharding.get_abstract_mesh().manual_axes:  # JAX lets no mutable array in
        return "it is used inside shard_map; calibrate the function of one device"
    if axes is None or axes.inputs != site.axes.inputs:
        return "it is multiplied along other axes than the plan's inputs"
    if sizes == [prod(site.in_shape), 1] and weight.layer is not None:
        return ""
    if sizes != [prod(site.in_shape), prod(site.stack_shape)]:
        return "a part of it is used alone, as a slice, or a layer picked by its index"
    return ""


def _differentiated(squares: Callable[..., dict[str, Array]], *args: Any) -> dict[str, Array]:
    try:
        return squares(*args)
    except ValueError as e:
        if "Reverse-mode differentiation" not in str(e):
            raise
        raise CompressError(
            "the loss has no gradient: the function runs a while loop, which JAX cannot differentiate backwards.\n"
            "  leave out loss and use 'whitened', or loop by lax.scan"
        ) from e


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
