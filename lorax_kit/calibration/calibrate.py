"""What the inputs of each site look like: sums over calibration batches, one pass, in memory that does not grow.

The function is traced as `lk.resolve` traces it. Where a parameter is multiplied, sum x x^T of its input is added to
a mutable array of the program (`jax.new_ref`), in whatever scan, while loop or branch that happens. Nothing is
differentiated for that, and XLA drops what follows the last input. Gradients of a loss are another program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from lorax_kit.calibration.arguments import batches_of, check_function, planned, scalar_of, shown
from lorax_kit.core.compact import dense
from lorax_kit.core.errors import CompressError
from lorax_kit.core.leaves import wide
from lorax_kit.core.method import Hints
from lorax_kit.core.paths import Params, is_array, unflatten
from lorax_kit.core.plan import Plan, Site
from lorax_kit.transform.trace import watch

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


def _add(sums: _Sums, site: Site, x: Array, layer: Array | None) -> None:
    if site.lookup:
        _count_rows(sums, x)
    else:
        _add_inputs(sums, x, layer)


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
    collect: Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, Hints]:
    """Sum what the sites of `plan` are given over calibration batches: what starts and compression read.

    Args:
      fn: `fn(params, batch)`, traceable by JAX.
      params: dense, or compressed in other places (`fn` is then `lk.compress.compressed(fn)`).
      plan: from `lk.resolve`; which parameters, and what their inputs are. Ranks do not matter.
      batches: each of one shape, or of few: a program is compiled for each shape.
      loss: `loss(fn(params, batch), batch)`, a scalar, for what is made of its gradients.
      collect: what to sum, of "inputs" (tokens, gram, absolute, counts), "fisher" (squared gradients) and "gradient"
        (their mean, as large as the parameters). None: the inputs, and with a loss "fisher", too.
      progress: show a bar.

    Returns:
      Hints by path, float64 on the host: `lk.split(params, plan, key, hints=...)` takes them, and `lk.compress`. Beyond
      params and one batch's activations the inputs of a site take 8 K^2 bytes on the device for K inputs, and as much
      on the host.

    Raises:
      CompressError: no batches; a site whose inputs no batch reached, or only in ways that have no rule; a loss
        without gradients, or gradients without a loss.

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
    sites = {site.path: site for site in plan.sites}
    skipped: dict[str, str] = {}

    @partial(jax.jit, donate_argnums=0)
    def add(sums: dict[str, _Sums], arrays: dict[str, Array], batch: Any) -> dict[str, _Sums]:
        refs = jax.tree.map(jax.new_ref, sums)

        def sink(site: Site, inputs: Array, layer: Array | None) -> None:
            _add(refs[site.path], site, inputs, layer)

        def missed(site: Site, why: str) -> None:
            skipped[site.path] = why

        watch(fn, plan, sink, missed)(unflatten({**named, **arrays}, treedef), batch)
        return jax.tree.map(jax.freeze, refs)

    @jax.jit
    def gradients(arrays: dict[str, Array], batch: Any) -> dict[str, dict[str, Array]]:
        assert loss is not None

        def value(weights: dict[str, Array]) -> Array:
            return scalar_of(loss, fn(unflatten({**named, **arrays, **weights}, treedef), batch), batch)

        grads = jax.grad(value)({p: dense(arrays[p]) for p in sites})
        return {p: _of_gradient(grads[p], site, wanted) for p, site in sites.items()}

    arrays = {p: x for p, x in named.items() if is_array(x)}
    sums = {p: _zeros(site) for p, site in sites.items()} if "inputs" in wanted else {}
    means: dict[str, dict[str, Any]] = {p: {} for p in sites}
    n = 0
    for batch in tqdm(batches_of("the calibration batches", batches), desc="calibration", disable=not progress):
        if any(0 in jnp.shape(x) for x in jax.tree.leaves(batch)):
            raise CompressError(f"calibration batch {n + 1} is empty.")
        if "inputs" in wanted:
            sums = add(sums, arrays, batch)
        if wanted - {"inputs"}:
            for path, parts in _differentiated(gradients, arrays, batch).items():
                for name, x in parts.items():
                    means[path][name] = means[path].get(name, 0.0) + np.asarray(x, np.float64)
        n += 1
    if n == 0:
        raise CompressError("there are no calibration batches.")
    hints = {p: Hints(**{name: x / n for name, x in parts.items()}) for p, parts in means.items()}
    if "inputs" in wanted:
        hints = {p: _with_inputs(hints[p], site, sums[p], skipped.get(p, "")) for p, site in sites.items()}
    for path, hint in hints.items():
        for numbers in hint:
            check_finite(numbers, path)
    return hints


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


def _with_inputs(hints: Hints, site: Site, sums: _Sums, skipped: str) -> Hints:
    """With the sums over the inputs of a site; `skipped` says why some uses of it were not summed.

    Raises:
      CompressError: no inputs, or not all of them.
    """
    tokens, second, first = (np.asarray(x, np.float64) for x in sums)
    way_out = "  leave it out of the plan, or give it a method or start that needs no data"
    if skipped and tokens > 0:
        raise CompressError(f"calibration knows some uses of {site.path!r}, but not all: {skipped}.\n{way_out}")
    if tokens == 0:
        why = skipped or "no batch led to a product or lookup of it"
        raise CompressError(f"calibration never reached {site.path!r}: {why}.\n{way_out}")
    if site.lookup:
        return hints._replace(tokens=float(tokens), counts=second)
    return hints._replace(tokens=float(tokens), gram=second, absolute=first / float(tokens))
