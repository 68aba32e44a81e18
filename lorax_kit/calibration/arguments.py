"""What `calibrate` refuses in its arguments, and compression in the same ones: each an error in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.core.merge import check_params
from lorax_kit.core.paths import Params, flatten, is_array
from lorax_kit.core.plan import Plan
from lorax_kit.core.specs.patterns import expand_braces, matches
from lorax_kit.errors import CompressError

Count = Callable[[Any], Any] | str
"""batch -> how much each input counts, or the name of a batch's own."""

InputWeight = Count | Mapping[str, Count]
"""One for all sites, or one for each group of them, by a pattern."""


def shown(x: Any) -> str:
    """A value in one short line: arrays by shape, the rest by its repr."""
    if is_array(x):
        return f"an array of shape {x.shape} and dtype {x.dtype}"
    text = repr(x)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(x).__name__}"


def check_function(name: str, fn: Any, of: str) -> None:
    """Raise `CompressError` unless it can be called; `of` says how."""
    if not callable(fn):
        raise CompressError(f"{name} is {shown(fn)}; it must be a function: {of}.")


def batches_of(name: str, batches: Any) -> Iterator[Any]:
    """An iterator over batches; one batch alone, or what cannot be iterated, is refused."""
    if is_array(batches) or isinstance(batches, str | bytes | Mapping) or not isinstance(batches, Iterable):
        raise CompressError(f"{name} are {shown(batches)}; give an iterable of batches.\n  for one batch: [batch]")
    return iter(batches)


def groups_of(paths: Iterable[str], groups: Sequence[str]) -> dict[str, str]:
    """Path -> the one of the patterns that matches it.

    Raises:
      CompressError: a path in no group, or in two.
    """
    patterns = {group: expand_braces(group) for group in groups}
    group_of = {}
    for path in paths:
        matching = [group for group, some in patterns.items() if any(matches(p, path) for p in some)]
        if len(matching) != 1:
            where = "no group" if not matching else f"{len(matching)} groups, first {matching[0]!r} and {matching[1]!r}"
            raise CompressError(f"the site {path!r} is in {where}; it must be in one.")
        group_of[path] = matching[0]
    return group_of


def counts_by_group(
    weight: InputWeight | None, plan: Plan
) -> tuple[dict[str, str], Callable[[Any], dict[str, np.ndarray]]]:
    """(path -> its group, batch -> how much the inputs of each group's sites count); both empty for None.

    Raises:
      CompressError: a weight that is no function or name, a site in no group or in two.
    """
    if weight is None:
        return {}, lambda batch: {}
    counts = dict(weight) if isinstance(weight, Mapping) else {"**": weight}
    for group, count in counts.items():
        if not isinstance(group, str):
            raise CompressError(f"the weights have the group {shown(group)}; it must be a pattern of sites.")
        if not isinstance(count, str):
            name = f"the weight of {group!r}" if isinstance(weight, Mapping) else "weight"
            check_function(name, count, "weight(batch), or the name of a batch's entry")
    groups = groups_of([site.path for site in plan.sites], list(counts))
    read = set(groups.values())
    return groups, lambda batch: {group: weights_of(count, batch) for group, count in counts.items() if group in read}


def weights_of(weight: Count, batch: Any) -> np.ndarray:
    """How much each input of a batch counts, fp32: by a function of the batch, or its entry of that name."""
    if callable(weight):
        value, name = weight(batch), "weight(batch)"
    else:
        value, name = _entry(batch, weight), f"the weight {weight!r} of a batch"
        if value is None:
            raise CompressError(f"weight is {weight!r}, and a batch, {shown(batch)}, has no such key or attribute.")
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    if not is_array(value) or value.shape == () or not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
        raise CompressError(f"{name} is {shown(value)}; it must be an array of real numbers, (rows, tokens) for texts.")
    counts = np.asarray(value, np.float32)
    if not (np.isfinite(counts).all() and (counts >= 0).all()):
        raise CompressError(f"{name} must be finite numbers of at least 0.")
    return counts


def mask_of(batch: Any) -> str | None:
    """The name of a batch's mask that has zeros, if it has one: "mask" or "attention_mask"."""
    for name in ("mask", "attention_mask"):
        value = _entry(batch, name)
        if is_array(value) and np.ndim(value) > 0 and not np.asarray(value).all():
            return name
    return None


def _entry(batch: Any, name: str) -> Any:
    return batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)


def check_values(params: Params) -> None:
    """Raise `CompressError` if params are traced."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params)):
        raise CompressError("the params are being traced: compression works on values, outside of jit and grad.")


def planned(params: Params, sites: Any) -> tuple[dict[str, Any], jax.tree_util.PyTreeDef]:
    """Flattened params that fit the sites.

    Raises:
      CompressError: sites that are no plan or have no low-rank site, a planned parameter that is no array.
      PlanError: params that do not fit.
    """
    if not isinstance(sites, Plan):
        raise CompressError(
            f"the sites are {shown(sites)}; they come from lk.resolve(spec, params, apply_fn, *inputs)."
        )
    if not sites.sites:
        raise CompressError("the plan has no low-rank sites: there is nothing to compress.")
    named, treedef = flatten(params)
    check_values(params)
    for site in sites.sites:
        if site.path in named and not is_array(named[site.path]):
            raise CompressError(f"{site.path!r} is {shown(named[site.path])}; it must be an array.")
    check_params(named, sites)
    return named, treedef


def scalar_of(loss: Callable[[Any, Any], Any], outputs: Any, batch: Any) -> Array:
    """`loss(outputs, batch)`, which must be one float."""
    value = loss(outputs, batch)
    if not is_array(value) and not isinstance(value, Real):
        raise CompressError(f"the loss returned {shown(value)}; it must be a float scalar, as jnp.mean(losses).")
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        kind = f"shape {jnp.shape(value)} and dtype {jnp.result_type(value)}"
        raise CompressError(f"the loss has {kind}; it must be a float scalar, as jnp.mean(losses).")
    return jnp.asarray(value)
