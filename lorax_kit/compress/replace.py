"""`plan` and `compress`: parameters become low-rank products, as a function of params, a static plan and data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.arrays.finite import all_finite
from lorax_kit.calibration.arguments import planned, shown
from lorax_kit.calibration.calibrate import Moments, Stats, check_finite, moments_of
from lorax_kit.compress.allocate import allocate, candidate
from lorax_kit.compress.arguments import check_count, check_key, check_word
from lorax_kit.compress.decompose import METHODS, decompose, singular_values, transform
from lorax_kit.core.leaves import site_key
from lorax_kit.core.lowrank import LowRank, dense
from lorax_kit.core.paths import Params, flatten, is_array, unflatten
from lorax_kit.core.plan import Plan
from lorax_kit.core.quantised import Quantised
from lorax_kit.core.site import Site
from lorax_kit.errors import CompressError


@dataclass(frozen=True, kw_only=True)
class CompressPlan:
    """Which parameters become products, of what rank, and how; static and hashable.

    Attributes:
      method: of `lorax_kit.compress.METHODS`.
      sites: what may be compressed.
      ranks: (path, rank) of what is; the rest stays dense. A mapping is taken, too.

    Raises:
      CompressError: a path that is no site.
    """

    method: str
    sites: Plan
    ranks: tuple[tuple[str, int], ...] | Mapping[str, int]

    def __post_init__(self) -> None:
        check_word("method", self.method, METHODS)
        if not isinstance(self.sites, Plan):
            raise CompressError(f"the sites are {shown(self.sites)}; they come from lk.resolve.")
        try:
            ranks = dict(self.ranks)
        except (TypeError, ValueError):
            raise CompressError(f"the ranks are {shown(self.ranks)}; give a mapping of paths to ranks.") from None
        ranks = {path: check_count(f"the rank of {path!r}", rank) for path, rank in ranks.items()}
        object.__setattr__(self, "ranks", tuple(ranks.items()))
        known = {site.path for site in self.sites.sites}
        if unknown := sorted(set(ranks) - known):
            raise CompressError(f"{unknown[0]!r} is no site of the plan.\n  the sites: {', '.join(sorted(known))}")

    @property
    def kept(self) -> float:
        """Share of the sites' parameters that remains."""
        total = sum(int(np.prod(site.shape)) for site in self.sites.sites)
        return sum(self.parameters(site, rank) for site, rank in self.chosen()) / total

    def chosen(self) -> list[tuple[Site, int | None]]:
        """Sites with their ranks, None where dense."""
        ranks = dict(self.ranks)
        return [(site, ranks.get(site.path)) for site in self.sites.sites]

    def __str__(self) -> str:
        """A line for each site with its shape, its rank and the share of its parameters that remains."""
        rows = []
        for site, rank in self.chosen():
            share = self.parameters(site, rank) / self.parameters(site, None)
            shape = "x".join(map(str, site.shape))
            rows.append((site.path, shape, "dense" if rank is None else f"rank {rank}", f"{share:.0%}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(
            [*(line.rstrip() for line in lines), f"{self.method} keeps {self.kept:.1%} of these parameters"]
        )

    @staticmethod
    def parameters(site: Site, rank: int | None) -> int:
        """Of a site at a rank, None for dense."""
        if rank is None:
            return int(np.prod(site.shape))
        s, k, n = (int(np.prod(x)) for x in (site.stack_shape, site.in_shape, site.out_shape))
        return rank * s * (k + n)


def plan_ranks(
    params: Params,
    sites: Plan,
    *,
    keep: float | None = None,
    max_bytes: int | None = None,
    method: str = "whitened",
    stats: Stats | None = None,
    allocation: str = "loss",
    minimum: int = 1,
) -> CompressPlan:
    """Choose the ranks that keep at most `keep` of the sites' parameters, or at most `max_bytes` of them.

    Args:
      params: that the sites were resolved against.
      sites: from `lk.resolve`; the ranks of its settings do not matter.
      keep: in (0, 1]; this or `max_bytes`.
      max_bytes: of all sites, in their own dtypes, whether they become products or stay whole.
      method: "svd", "fisher", "asvd" or "whitened".
      stats: from `calibrate`; all but "svd" need it.
      allocation: "loss", "energy" or "uniform", as `allocate` says. "loss" adds up what truncations drop in the norm
        of the method: for "whitened" errors of outputs, each site's times the mean squared gradient of the loss there,
        if `stats` have gradients (`calibrate(..., loss=...)`). Give them: layers whose outputs are large would
        otherwise be given most (SmolLM2 with a fifth removed: perplexity 41 with, 242 without; 58 by "uniform").
      minimum: the least rank.

    Returns:
      The plan. A site of which a product would not pay, or that gains most from staying whole, has no rank in it:
      `compress` leaves it dense.

    Raises:
      CompressError: unknown words, an impossible budget, data that are missing, singular beyond use, or not finite.
      PlanError: params that do not fit the sites.
    """
    named, _ = planned(params, sites)
    check_word("method", method, METHODS)
    if (keep is None) == (max_bytes is None):
        raise CompressError("give one budget: keep, a share of the parameters, or max_bytes.")
    if max_bytes is not None:
        check_count("max_bytes", max_bytes)
        for site in sites.sites:
            if isinstance(named[site.path], Quantised):
                raise CompressError(f"max_bytes counts arrays, and {site.path!r} is quantised.\n  give keep")
    _warn_of_little_data(sites.sites, method, stats)
    candidates, blind = {}, False
    for site in sites.sites:
        stacked = _dense(named[site.path], site)
        values = np.stack([singular_values(w, transform(method, stats, site.path, i)) for i, w in enumerate(stacked)])
        if method == "whitened" and allocation == "loss" and stats is not None:
            blind = blind or stats[site.path].fisher is None
            weights = _sensitivity(stats[site.path], site.path)
            if len(weights) not in (1, len(values)):
                raise CompressError(
                    f"the stats of {site.path!r} are of {len(weights)} stacked matrices; the parameter has "
                    f"{len(values)}.\n  calibrate this model"
                )
            values = values * np.sqrt(weights)[:, None]
        candidates[site.path] = candidate(values, *stacked.shape[1:])
        if max_bytes is not None:
            candidates[site.path] = candidates[site.path].times(named[site.path].dtype.itemsize)
    if blind and len(sites.sites) > 1:
        warnings.warn(
            "ranks by 'loss' without gradients favour sites of large outputs: calibrate(..., loss=...), or 'energy'",
            stacklevel=2,
        )
    total = sum(c.dense for c in candidates.values())
    share = keep if max_bytes is None else min(max_bytes / total, 1.0)
    assert share is not None
    try:
        ranks = allocate(candidates, share, allocation, minimum)
    except CompressError as e:
        raise e if max_bytes is None else CompressError(f"max_bytes={max_bytes} of {total}: {e}") from None
    return CompressPlan(method=method, sites=sites, ranks=tuple((p, r) for p, r in ranks.items() if r is not None))


def compress(params: Params, plan: CompressPlan, stats: Stats | None = None, *, key: Array | None = None) -> Params:
    """Params in which each planned parameter is the product of two, for `compressed(fn)`.

    Args:
      params: left as they are; what is not compressed is shared, not copied.
      plan: from `plan_ranks`, or made by hand.
      stats: from `calibrate`, for methods that need it.
      key: decompose by randomised projections, from this key; without it exactly, in float64 on the host.

    Returns:
      The tree of `params` with `LowRank` leaves, whose arrays are at `PATH/a` and `PATH/b`, in the parameter's dtype.

    Raises:
      CompressError: as `plan_ranks`; a rank at which a product has no fewer parameters than the matrix.
      PlanError: params that do not fit the plan.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.eye(8)[:, :6]}
      >>> sites = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params)
      >>> small = compress(params, CompressPlan(method="svd", sites=sites, ranks={"w": 2}))
      >>> small["w"].a.shape, small["w"].b.shape
      ((2, 8), (2, 6))
    """
    check_plan(plan)
    named, treedef = planned(params, plan.sites)
    if key is not None:
        check_key(key)
    _warn_of_little_data([site for site, rank in plan.chosen() if rank is not None], plan.method, stats)
    out = dict(named)
    for site, rank in plan.chosen():
        if rank is None:
            continue
        size = plan.parameters(site, None)
        if not 1 <= rank <= site.max_rank or plan.parameters(site, rank) >= size:
            raise CompressError(
                f"rank {rank} at {site.path!r} keeps {plan.parameters(site, rank)} of {size} parameters: "
                f"it must be at least 1, and below {size / (plan.parameters(site, 1)):.1f}.\n"
                "  leave it dense"
            )
        own = None if key is None else site_key(key, site.path)
        out[site.path] = _replaced(site, named[site.path], plan.method, rank, stats, own)
    return unflatten(out, treedef)


def check_plan(plan: Any) -> None:
    """Raise `CompressError` unless it is one."""
    if not isinstance(plan, CompressPlan):
        raise CompressError(f"the plan is {shown(plan)}; it comes from lk.compress.plan_ranks, or is a CompressPlan.")


def _warn_of_little_data(sites: Sequence[Site], method: str, stats: Stats | None) -> None:
    """Directions that no input took are decided by the damping alone: `damping` says how much was added."""
    if method != "whitened" or stats is None:
        return
    short = [
        (site, seen)
        for site in sites
        if not site.lookup and (seen := moments_of(stats, site.path, method).tokens) < prod(site.in_shape)
    ]
    if short:
        site, seen = short[0]
        warnings.warn(
            f"{len(short)} of {len(sites)} sites saw fewer inputs than they have dimensions, first {site.path!r}: "
            f"{seen:.0f} of {prod(site.in_shape)}; calibrate on more batches",
            stacklevel=3,
        )


def _sensitivity(moments: Moments, path: str) -> np.ndarray:
    """(S,) how much the loss minds an error of the outputs: their mean squared gradient, up to a factor.

    E (dL/dW_kn)^2 = E x_k^2 E g_n^2 where inputs and output gradients are independent (K-FAC, Martens & Grosse, arXiv
    1503.05671), so the sum of the one over k, over that of E x_k^2, is E g_n^2. Ones without gradients.
    """
    if moments.fisher is None:
        return np.ones(1)
    check_finite(moments.fisher, path)
    given = moments.squares
    assert given is not None  # `transform` read it
    if given.shape != moments.fisher.shape:
        raise CompressError(
            f"the stats of {path!r} have gradients of shape {moments.fisher.shape} and inputs of shape {given.shape}.\n"
            "  calibrate this model"
        )
    return np.sum(moments.fisher, axis=1) / np.maximum(np.sum(given, axis=1), np.finfo(np.float64).tiny)


def _dense(x: Any, site: Site) -> np.ndarray:
    stacked = np.asarray(site.matrices(dense(x)), np.float64)
    if not np.isfinite(stacked).all():
        raise CompressError(f"{site.path!r} holds values that are not finite.")
    return stacked


def _replaced(site: Site, x: Any, method: str, rank: int, stats: Stats | None, key: Array | None) -> LowRank:
    pairs = [
        decompose(w, transform(method, stats, site.path, i), rank, key).factors(rank)
        for i, w in enumerate(_dense(x, site))
    ]
    a, b = (jnp.asarray(np.stack(side, 1), x.dtype) for side in zip(*pairs, strict=True))  # (r, S, K), (r, S, N)
    if not (all_finite(a) and all_finite(b)):
        raise CompressError(f"the factors of {site.path!r} do not fit into {x.dtype}.\n  cast it to float32 first")
    return LowRank(
        a=a.reshape(rank, *site.stack_shape, *site.in_shape),
        b=b.reshape(rank, *site.stack_shape, *site.out_shape),
        shape=site.shape,
        dtype=x.dtype,
        inputs=site.axes.inputs,
        outputs=site.axes.outputs,
        stack=site.axes.stack,
    )


def low_rank(params: Params) -> dict[str, LowRank]:
    """The products among params, by path."""
    return {p: x for p, x in flatten(params, whole=(LowRank,))[0].items() if isinstance(x, LowRank)}


def with_residuals(params: Params, small: Params) -> Params:
    """`small` whose products keep what they leave of the parameters: exact to rounding, until that is quantised.

    Args:
      params: the dense ones.
      small: what `compress` made of them.

    Returns:
      The tree of `small`; its `LowRank` leaves have a `residual`, at `PATH/residual`, for `lk.quantize`.

    Raises:
      CompressError: nothing is low-rank, a residual is there, params of another shape or not finite.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.arange(12.0).reshape(3, 4)}
      >>> sites = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params)
      >>> small = compress(params, CompressPlan(method="svd", sites=sites, ranks={"w": 1}))
      >>> kept = lk.quantize(with_residuals(params, small), ["w/residual"], "int8", block=4)
      >>> bool(jnp.allclose(kept["w"].restore(), params["w"], atol=0.02))
      True
    """
    named, treedef = flatten(small, whole=(LowRank,))
    originals, _ = flatten(params, whole=(LowRank,))
    products = low_rank(small)
    if not products:
        raise CompressError("no parameter of the second argument is low-rank: with_residuals(params, small).")
    out = dict(named)
    for path, leaf in products.items():
        if leaf.residual is not None:
            raise CompressError(f"{path!r} has a residual already.")
        original = originals.get(path)
        fits = is_array(original) and not isinstance(original, LowRank)
        if original is None or not fits or tuple(original.shape) != leaf.shape:
            raise CompressError(
                f"{path!r} is low-rank of shape {leaf.shape}; the params there are {shown(original)}.\n"
                "  give the dense params that were compressed"
            )
        residual = dense(original).astype(leaf.dtype) - leaf.restore()
        if not all_finite(residual):
            raise CompressError(f"{path!r} holds values that are not finite.")
        out[path] = replace(leaf, residual=residual)
    return unflatten(out, treedef)
