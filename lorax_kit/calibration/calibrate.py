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
from math import prod
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from lorax_kit.calibration.arguments import batches_of, check_function, mask_of, planned, scalar_of, shown, weights_of
from lorax_kit.core.lowrank import dense
from lorax_kit.core.method import Hints
from lorax_kit.core.paths import Params, is_array, unflatten
from lorax_kit.core.plan import Plan
from lorax_kit.core.site import Site
from lorax_kit.dtypes import wide
from lorax_kit.errors import CompressError
from lorax_kit.placement import alike, varies
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


def _over_devices(found: Any, differs: frozenset[str]) -> Any:
    """Arrays summed over the devices of a `shard_map` that hold other inputs; one of those that hold the same."""

    def total(x: Array) -> Array:
        shared = tuple(sorted(varies(x) - differs))
        x = jax.lax.psum(x, tuple(sorted(varies(x) & differs))) if varies(x) & differs else x
        return jax.lax.pmax(x, shared) if shared else x

    return jax.tree.map(total, found)


def _count_rows(sums: _Sums, rows: Array, counts: Array, differs: frozenset[str]) -> None:
    rows, counts, zeros = alike((rows, counts, jnp.zeros(sums.second.shape)))
    second, tokens = _over_devices((zeros.at[rows].add(counts, mode="drop"), jnp.sum(counts)), differs)
    sums.second[...] += second
    sums.tokens[...] += tokens


def _add_inputs(sums: _Sums, x: Array, counts: Array, layer: Array | None, differs: frozenset[str]) -> None:
    """Accumulate the moments of x (*S, M, K).

    With `layer`, x (M, K) belongs to that matrix of the stack only, and its tokens count 1 / S. `counts` (*S, M) weighs
    the rows; a row of weight 0 may hold anything.
    """
    x, counts = alike((x, counts))
    x = x.astype(jnp.float32).reshape(-1, *x.shape[-2:])
    counts = counts.reshape(-1, x.shape[1], 1)
    x = jnp.where(counts > 0, x, 0)
    second = jnp.einsum("smi,smj->sij", counts * x, x, precision=jax.lax.Precision.HIGHEST)
    first, tokens = jnp.sum(counts * jnp.abs(x), axis=1), jnp.sum(counts) / counts.shape[0]
    second, first, tokens = _over_devices((second, first, tokens), differs)
    if layer is None:
        sums.second[...] += second
        sums.first[...] += first
        sums.tokens[...] += tokens
    else:
        sums.second[layer] += second[0]
        sums.first[layer] += first[0]
        sums.tokens[...] += tokens / sums.first.shape[0]


def _counts(weights: Array | None, site: Site, given: Given, inside: bool) -> Array | str:
    """How much each row of the inputs counts, (*S, M), or (M,) of a lookup; or why it is not known.

    Args:
      weights: of a batch's inputs, whose axes lead those of the value that the site is given, or are flattened there
        into one. Where the value has one row for each of their first axis, as after pooling, a row counts as much as
        the input of it that counts most.
      inside: in the body of a loop or branch, where one row for each of the first axis may be one step's.
    """
    x, shape = given.value, given.inputs.shape if site.lookup else given.inputs.shape[:-1]
    if weights is None:
        return jnp.ones(shape)
    n, rows = weights.ndim, x.shape[:1] + (1,) * (x.ndim - 1)
    if x.ndim > n and x.shape[:n] == weights.shape:
        flags = weights.reshape(*weights.shape, *(1,) * (x.ndim - n))
    elif n > 1 and x.shape[0] == weights.size:
        flags = weights.reshape(rows)
    elif n > 1 and not inside and x.shape[0] == weights.shape[0] == prod(shape):
        flags = jnp.max(weights.reshape(weights.shape[0], -1), axis=1).reshape(rows)
    else:
        return f"which of its inputs count is not known: they are {x.shape}, the weights {weights.shape}"
    if not site.lookup:
        return jnp.max(given.arrange(jnp.broadcast_to(flags, x.shape)), axis=-1)
    if flags.size != prod(shape):
        return f"which of its {prod(shape)} lookups count is not known: the weights are {weights.shape}"
    return flags.reshape(-1)


def calibrate(
    fn: Callable[..., Any],
    params: Params,
    plan: Plan,
    batches: Iterable[Any],
    *,
    loss: Callable[[Any, Any], Array] | None = None,
    weight: Callable[[Any], Any] | str | None = None,
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
        0 leaves padding out; default: all count alike, with a warning where a batch has a mask with zeros. What
        gradients are of, the loss says.
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
    if weight is not None and not isinstance(weight, str):
        check_function("weight", weight, "weight(batch), or the name of a batch's entry")
    wanted = _wanted(collect, loss)
    named, treedef = planned(params, plan)
    sites = {site.path: site for site in plan.sites}
    skipped: dict[str, str] = {}

    @partial(jax.jit, donate_argnums=0)
    def add(sums: dict[str, _Sums], arrays: dict[str, Array], batch: Any, weights: Array | None) -> dict[str, _Sums]:
        refs, outside = jax.tree.map(jax.new_ref, sums), jex.get_opaque_trace_state()
        held = [(refs, True)]  # where sums go: the program's arrays, or those of one device within shard_map

        def sink(site: Site, given: Given) -> None:
            counts = _counts(weights, site, given, inside=jex.get_opaque_trace_state() != outside)
            here, typed = held[-1]
            if not typed:
                counts = "shard_map(check_vma=False) does not tell along which axes its inputs differ"
            if isinstance(counts, str):
                skipped[site.path] = counts
            elif site.lookup:
                _count_rows(here[site.path], given.inputs, counts, given.differs)
            else:
                _add_inputs(here[site.path], given.inputs, counts, given.layer, given.differs)

        def begin(typed: bool) -> None:
            held.append((jax.tree.map(jax.new_ref, {p: _zeros(site) for p, site in sites.items()}), typed))

        def end() -> dict[str, _Sums]:
            return jax.tree.map(jax.freeze, held.pop()[0])

        def add_shards(found: dict[str, _Sums]) -> None:
            for ref, x in zip(jax.tree.leaves(held[-1][0]), jax.tree.leaves(found), strict=True):
                ref[...] += x

        def missed(site: Site, why: str) -> None:
            skipped[site.path] = why

        watch(fn, plan, sink, missed, Shards(begin, end, add_shards))(unflatten({**named, **arrays}, treedef), batch)
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
    for batch in tqdm(
        batches_of("the calibration batches", batches), desc="calibration", disable=None if progress else True
    ):
        if any(0 in jnp.shape(x) for x in jax.tree.leaves(batch)):
            raise CompressError(f"calibration batch {n + 1} is empty.")
        if "inputs" in wanted:
            if weight is None and n == 0 and (name := mask_of(batch)):
                warnings.warn(
                    f"the batches have a {name!r} with zeros, and padding counts as calibration data: "
                    f"calibrate(..., weight={name!r}) leaves it out",
                    stacklevel=2,
                )
            sums = add(sums, arrays, batch, None if weight is None else weights_of(weight, batch))
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
        why = skipped or "no batch led to a product or lookup of it, or none of weight above 0"
        raise CompressError(f"calibration never reached {site.path!r}: {why}.\n{way_out}")
    if site.lookup:
        return hints._replace(tokens=float(tokens), counts=second)
    return hints._replace(tokens=float(tokens), gram=second, absolute=first / float(tokens))
