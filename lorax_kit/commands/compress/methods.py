"""What each way of making a model smaller does: its statistics, its params and function, their bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lorax_kit.commands.compress.recipe import Method, Recipe
from lorax_kit.commands.compress.subjects import Apply, Subject
from lorax_kit.compress import (
    Moments,
    calibrate,
    compress,
    compress_sequentially,
    compressed,
    plan_ranks,
    prune,
    with_residuals,
)
from lorax_kit.compress.replace import low_rank
from lorax_kit.core.paths import Params, flatten
from lorax_kit.core.plan import matched
from lorax_kit.core.quantised import quantize
from lorax_kit.core.specs.patterns import matches
from lorax_kit.errors import CompressError


class Small(NamedTuple):
    """A smaller model: `apply(params, batch)`."""

    apply: Apply
    params: Params


def statistics_for(
    subject: Subject, methods: Iterable[Method], batches: int, *, allocation: str = "loss", progress: bool = True
) -> dict[str, Moments] | None:
    """What the methods read of the first batches of the training stream; None where none of them is calibrated."""
    calibrated = [method for method in methods if method.calibrated]
    if not calibrated:
        return None
    stream = list(itertools.islice(subject.train(0), batches))  # a list: its bar knows the end
    loss = subject.loss if any(method.wants_gradients(allocation) for method in calibrated) else None
    return calibrate(
        subject.apply,
        subject.params,
        subject.sites,
        stream,
        loss=loss,
        weight=subject.problem.counts,
        progress=progress,
    )


def smaller(subject: Subject, recipe: Recipe, stats: Mapping[str, Moments] | None, *, progress: bool = True) -> Small:
    """The model made smaller, before it is healed and its factors are quantised (`finished`).

    Args:
      stats: for methods that are calibrated.

    Raises:
      CompressError: what `plan_ranks`, `compress` and `prune` raise.
    """
    method, sites = recipe.way, subject.sites
    if method.kind == "student":
        for layer in subject.problem.layers:
            if not any(matches(layer, site.path) for site in sites.sites):
                raise CompressError(
                    f"a student has fewer layers, and no target is in {layer!r}: leave the targets out."
                )
        return Small(*subject.student(students_layers(subject, recipe.keep)))
    if method.kind in ("quantised", "tuned"):
        return Small(subject.apply, subject.params)
    if method.kind == "pruned":
        pruned = prune(subject.params, sites, keep=recipe.keep, method=method.base, stats=stats, pattern=method.pattern)
        return Small(subject.apply, pruned)
    plan = plan_ranks(
        subject.params, sites, keep=recipe.keep, method=method.base, stats=stats, allocation=recipe.allocation
    )
    if recipe.sequential:
        batches = list(itertools.islice(subject.train(0), recipe.batches))
        loss = subject.loss if method.base == "fisher" else None
        groups = [layer for layer in subject.problem.layers if any(matches(layer, site.path) for site in sites.sites)]
        small = compress_sequentially(
            subject.apply,
            subject.params,
            plan,
            batches,
            groups,
            loss=loss,
            weight=subject.problem.counts,
            progress=progress,
        )
    else:
        small = compress(subject.params, plan, stats)
    if method.residual:
        small = with_residuals(subject.params, small) if low_rank(small) else small
        products = low_rank(small)
        whole = [site.path for site in sites.sites if site.path not in products]
        small = quantize(small, [*(f"{path}/residual" for path in products), *whole], method.bits)
    return Small(compressed(subject.apply), small)


def students_layers(subject: Subject, keep: float) -> int:
    """How many layers a student has that keeps such a share of them."""
    return max(round(keep * len(subject.problem.layers)), 1)


def finished(subject: Subject, method: Method, small: Small) -> Small:
    """With what the method's last step quantises."""
    if not method.bits or method.residual:
        return small
    products = low_rank(small.params)
    factors = [f"{path}/{side}" for path in products for side in "ab"]
    whole = [site.path for site in subject.sites.sites if site.path not in products]
    return Small(compressed(subject.apply), quantize(small.params, [*factors, *whole], method.bits))


def stored_bytes(subject: Subject, method: Method, params: Params) -> int:
    """Bytes in which the targets can be stored.

    Low-rank and quantised leaves count as they are kept; zeros of pruning in a bitmap of one bit per entry beside the
    values (two per kept value for 2:4), which is how sparse formats for such shares store them.
    """
    named = flatten(params)[0]
    if method.kind == "pruned":
        arrays = [named[site.path] for site in subject.sites.sites]
        kept = [int(jnp.sum(x != 0)) for x in arrays]
        values = sum(x.dtype.itemsize * n for x, n in zip(arrays, kept, strict=True))
        return values + (sum(kept) // 4 if method.pattern == "2:4" else sum(x.size for x in arrays) // 8)
    if method.kind == "student":
        paths = {p for pattern in subject.targets for p in matched("the target", pattern, list(named))}
    else:
        paths = {site.path for site in subject.sites.sites}
    return sum(x.nbytes for p, x in named.items() if p in paths or p.rsplit("/", 1)[0] in paths)


def total_bytes(params: Params) -> int:
    """Of all arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(params))
