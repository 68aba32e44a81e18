"""What the inputs of each site look like: sums over calibration batches, one pass, in memory that does not grow.

The function is traced as `lk.resolve` traces it. Where a parameter is multiplied, sum x x^T of its input is added to
a mutable array of the program (`jax.new_ref`), in whatever scan, while loop or branch that happens. Nothing is
differentiated for that, and XLA drops what follows the last input. Gradients of a loss are another program. Within
`shard_map` each device sums in arrays of its own, and what differs between devices is added up over them.

Padding is given to a site like any other input: `weight` says which inputs count.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from lorax_kit.arrays.dtypes import wide
from lorax_kit.calibration.arguments import (
    InputWeight,
    batches_of,
    check_function,
    counts_by_group,
    mask_of,
    planned,
    scalar_of,
    shown,
)
from lorax_kit.calibration.sums import Sums, add_inputs, count_rows, counts_of, with_inputs, zeros
from lorax_kit.core.lowrank import dense
from lorax_kit.core.method import Hints
from lorax_kit.core.paths import Params, is_array, unflatten
from lorax_kit.core.plan import Plan
from lorax_kit.core.site import Site
from lorax_kit.errors import CompressError
from lorax_kit.transform.context import Shards
from lorax_kit.transform.trace import Given, watch

Moments = Hints
"""The name that compression gives to what it reads of a site."""

Stats = Mapping[str, Hints]
COLLECT = ("inputs", "fisher", "gradient")


def moments_of(stats: Stats | None, path: str, method: str) -> Hints:
    """Those of a site, for a method that needs them.

    Raises:
      CompressError: there are none.
    """
    if stats is not None and not isinstance(stats, Mapping):
        raise CompressError(f"stats are {shown(stats)}; they must be what lk.compress.calibrate returns.")
    if stats is None or path not in stats:
        raise CompressError(f"{method!r} needs calibration data for {path!r}.\n  stats = lk.compress.calibrate(...)")
    if not isinstance(stats[path], Hints):
        raise CompressError(f"the stats of {path!r} are {shown(stats[path])}; lk.compress.calibrate makes them.")
    return stats[path]


def check_finite(x: Any, path: str) -> None:
    """Raise `CompressError` if moments of a site are not finite; None is."""
    if x is not None and not np.isfinite(x).all():
        raise CompressError(
            f"the calibration data of {path!r} are not finite: an input or gradient was, or sums overflowed.\n"
            "  check the params and the batches"
        )


def calibrate(
    fn: Callable[..., Any],
    params: Params,
    plan: Plan,
    batches: Iterable[Any],
    *,
    loss: Callable[[Any, Any], Array] | None = None,
    weight: InputWeight | None = None,
    collect: Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, Hints]:
    """Sum what the sites of `plan` are given over calibration batches: what starts and compression read.

    Args:
      fn: `fn(params, batch)`, traceable by JAX: of a function of several inputs make
        `lambda params, batch: fn(params, *batch)`.
      params: dense, or compressed in other places (`fn` is then `lk.compress.compressed(fn)`).
      plan: from `lk.resolve`; which parameters, and what their inputs are. Ranks do not matter.
      batches: each of one shape, or of few: a program is compiled for each shape.
      loss: `loss(fn(params, batch), batch)`, a scalar, for what is made of its gradients.
      weight: how much each input counts: batch -> numbers, (rows, tokens) for texts, whose axes lead those of what the
        sites are given, in that order where a site has them flattened into one; or the name of a batch's own ("mask").
        0 leaves padding out; default: all count alike, with a warning where a batch has a mask with zeros. A mapping
        from patterns gives each group of sites its own: those of an encoder and of a decoder read different tokens.
        What gradients are of, the loss says.
      collect: what to sum, of "inputs" (tokens, gram, absolute, counts), "fisher" (squared gradients) and "gradient"
        (their mean, as large as the parameters). None: the inputs, and with a loss "fisher", too.
      progress: show a bar.

    Returns:
      Hints by path, float64 on the host: `lk.split(params, plan, key, hints=...)` takes them, and `lk.compress`. Beyond
      params and one batch's activations the inputs of a site take 8 K^2 bytes on the device for K inputs, and as much
      on the host.

    Raises:
      CompressError: no batches; a site in no group of the weights, or in two; a site whose inputs no batch reached, or
        only in ways that have no rule; a loss without gradients, or gradients without a loss.

    Example:
      >>> import lorax_kit as lk
      >>> params, x = {"w": jnp.ones((3, 2))}, jnp.arange(12.0).reshape(4, 3)
      >>> fn = lambda p, x: x @ p["w"]
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1, start="eva")}), params, fn, x)
      >>> stats = calibrate(fn, params, plan, [x, x], progress=False)
      >>> stats["w"].tokens, stats["w"].gram[0, 0].tolist()
      (8.0, [252.0, 288.0, 324.0])
      >>> base, factors = lk.split(params, plan, jax.random.key(0), hints=stats)
    """
    check_function("fn", fn, "fn(params, batch)")
    if loss is not None:
        check_function("loss", loss, "loss(fn(params, batch), batch)")
    wanted = _wanted(collect, loss)
    named, treedef = planned(params, plan)
    groups, weighed = counts_by_group(weight, plan)
    sites = {site.path: site for site in plan.sites}

    def whole(arrays: dict[str, Array]) -> Params:
        return unflatten({**named, **arrays}, treedef)

    skipped: dict[str, str] = {}
    summed = _summing(fn, plan, groups, skipped)

    @partial(jax.jit, donate_argnums=0)
    def add(sums: dict[str, Sums], arrays: dict[str, Array], batch: Any, weights: dict[str, Array]) -> dict[str, Sums]:
        return summed(sums, whole(arrays), batch, weights)

    @jax.jit
    def gradients(arrays: dict[str, Array], batch: Any) -> dict[str, dict[str, Array]]:
        assert loss is not None

        def value(weights: dict[str, Array]) -> Array:
            return scalar_of(loss, fn(whole({**arrays, **weights}), batch), batch)

        grads = jax.grad(value)({p: dense(arrays[p]) for p in sites})
        return {p: _of_gradient(grads[p], site, wanted) for p, site in sites.items()}

    arrays = {p: x for p, x in named.items() if is_array(x)}
    sums = {p: zeros(site) for p, site in sites.items()} if "inputs" in wanted else {}
    means: dict[str, dict[str, Any]] = {p: {} for p in sites}
    n, given = 0, batches_of("the calibration batches", batches)
    for batch in tqdm(given, desc="calibration", disable=None if progress else True):
        if any(0 in jnp.shape(x) for x in jax.tree.leaves(batch)):
            raise CompressError(f"calibration batch {n + 1} is empty.")
        if "inputs" in wanted:
            if weight is None and n == 0 and (name := mask_of(batch)):
                warnings.warn(
                    f"the batches have a {name!r} with zeros, and padding counts as calibration data: "
                    f"calibrate(..., weight={name!r}), or counts= of the problem, leaves it out",
                    stacklevel=2,
                )
            sums = add(sums, arrays, batch, weighed(batch))
        if wanted - {"inputs"}:
            for path, parts in _differentiated(gradients, arrays, batch).items():
                for name, x in parts.items():
                    means[path][name] = means[path].get(name, 0.0) + np.asarray(x, np.float64)
        n += 1
    if n == 0:
        raise CompressError("there are no calibration batches.")
    hints = {p: Hints(**{name: x / n for name, x in parts.items()}) for p, parts in means.items()}
    if "inputs" in wanted:
        hints = {p: with_inputs(hints[p], site, sums[p], skipped.get(p, "")) for p, site in sites.items()}
    for path, hint in hints.items():
        for numbers in hint:
            check_finite(numbers, path)
    return hints


def _summing(
    fn: Callable[..., Any], plan: Plan, groups: Mapping[str, str], skipped: dict[str, str]
) -> Callable[[dict[str, Sums], Params, Any, dict[str, Array]], dict[str, Sums]]:
    """(sums, params, batch, weights of its inputs by group) -> the sums with those of the batch; to be compiled.

    Args:
      groups: path -> the group of its weights; empty: all inputs count alike.
      skipped: gets the reason for each use whose inputs cannot be summed, as the function is traced.
    """

    def fresh() -> dict[str, Sums]:
        return jax.tree.map(jax.new_ref, {site.path: zeros(site) for site in plan.sites})

    def add(sums: dict[str, Sums], params: Params, batch: Any, weights: dict[str, Array]) -> dict[str, Sums]:
        refs, outside = jax.tree.map(jax.new_ref, sums), jex.get_opaque_trace_state()
        held = [(refs, True)]  # where sums go: the program's arrays, or those of one device within shard_map

        def sink(site: Site, given: Given) -> None:
            own = weights[groups[site.path]] if groups else None
            counts = counts_of(own, site, given, inside=jex.get_opaque_trace_state() != outside)
            here, typed = held[-1]
            if not typed:
                counts = "shard_map(check_vma=False) does not tell along which axes its inputs differ"
            if isinstance(counts, str):
                skipped[site.path] = counts
            elif site.lookup:
                count_rows(here[site.path], given.inputs, counts, given.differs)
            else:
                add_inputs(here[site.path], given.inputs, counts, given.layer, given.differs)

        def missed(site: Site, why: str) -> None:
            skipped[site.path] = why

        def end() -> dict[str, Sums]:
            return jax.tree.map(jax.freeze, held.pop()[0])

        def add_shards(shard_sums: dict[str, Sums]) -> None:
            for ref, x in zip(jax.tree.leaves(held[-1][0]), jax.tree.leaves(shard_sums), strict=True):
                ref[...] += x

        shards = Shards(lambda typed: held.append((fresh(), typed)), end, add_shards)
        watch(fn, plan, sink, missed, shards)(params, batch)
        return jax.tree.map(jax.freeze, refs)

    return add


def _wanted(collect: Any, loss: Any) -> set[str]:
    """What to collect.

    Raises:
      CompressError: an unknown word, nothing, or gradients without a loss.
    """
    if collect is None:
        return {"inputs"} if loss is None else {"inputs", "fisher"}
    words = (collect,) if isinstance(collect, str) else collect
    ok = isinstance(words, list | tuple | set | frozenset) and words and all(word in COLLECT for word in words)
    if not ok:
        raise CompressError(f"collect is {shown(collect)}; it must list some of {', '.join(COLLECT)}.")
    if loss is None and set(words) - {"inputs"}:
        raise CompressError(
            f"collect={tuple(words)} needs a loss to differentiate: loss=lambda outputs, batch: ..., a scalar."
        )
    return set(words)


def _differentiated(gradients: Callable[..., Any], *args: Any) -> Any:
    try:
        return gradients(*args)
    except ValueError as e:
        if "Reverse-mode differentiation" not in str(e):
            raise
        raise CompressError(
            "the loss has no gradient: the function runs a while loop, which JAX cannot differentiate backwards.\n"
            "  leave out loss and use 'whitened', or loop by lax.scan"
        ) from e


def _of_gradient(g: Array, site: Site, wanted: set[str]) -> dict[str, Array]:
    g = g.astype(wide(g.dtype))
    means = {"gradient": g} if "gradient" in wanted else {}
    return means | ({"fisher": jnp.mean(site.matrices(g) ** 2, axis=-1)} if "fisher" in wanted else {})
