"""Several tasks in one adapter: sums of deltas, and what prunes them first. Never a product of one's A and another's B.

| how             | of the deltas d_i, with weights w_i                                             | rank by default |
| --------------- | ------------------------------------------------------------------------------- | --------------- |
| cat, linear     | sum_i w_i d_i                                                                   | the ranks added |
| svd             | the same                                                                        | the highest     |
| magnitude_prune | sum_i w_i trim(d_i)                                                             | the highest     |
| ties            | of w_i trim(d_i), by entry: the sign of the sum, then the mean of those with it | the highest     |
| dare_linear     | sum_i w_i drop(d_i)                                                             | the highest     |
| dare_ties       | as ties, of w_i drop(d_i)                                                       | the highest     |

`trim` keeps the share `density` of a task's entries that are largest, over all its sites together, as TIES has it
(Yadav et al., arXiv 2306.01708, section 4 and algorithm 1); the paper's lambda is one number for all weights. `drop`
keeps each entry with probability `density`, divided by it (DARE: Yu et al., arXiv 2311.03099, eq. 2-4).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.algebra.adaptation import (
    Adaptation,
    AnyAdapter,
    bases,
    check_key,
    check_rank,
    check_result,
    check_share,
    check_weights,
    checked,
    plain,
    planned,
)
from lorax_kit.algebra.delta import Rows, delta_of, full_delta
from lorax_kit.algebra.linear import concatenate, moved
from lorax_kit.algebra.rank import cut, cut_whole
from lorax_kit.core.leaves import site_key
from lorax_kit.core.lowrank import dense
from lorax_kit.core.paths import Params, flatten, unflatten
from lorax_kit.core.site import FullSite, Site
from lorax_kit.errors import AdapterError

SUMS = ("cat", "linear", "svd")
WAYS = (*SUMS, "magnitude_prune", "ties", "dare_linear", "dare_ties")
"""What `how` may be."""


def combine(
    adapters: Iterable[AnyAdapter],
    how: str,
    *,
    weights: Sequence[Any] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    disjoint: str = "mean",
    key: Array | None = None,
    base: Params | None = None,
) -> Adaptation:
    """One adapter of several tasks, computed on their deltas.

    What is trained in full is combined alike, its delta being its value less the base; it has no rank to be cut to.

    Args:
      adapters: of the same sites; their methods and ranks may differ.
      how: of the table at the top of `lorax_kit.algebra.combine`.
      weights: one for each adapter; ones by default.
      rank: the highest rank of the result's sites; see the table for what it is without.
      energy: the share of |delta|_F^2 that is kept, in (0, 1]; the rank is the least that does, at most `rank`.
      density: in (0, 1], the share of entries that "magnitude_prune", "ties" and "dare_*" keep.
      disjoint: "mean" or "sum" of the entries that share the elected sign.
      key: a JAX random key, for "dare_*"; the masks of a site do not depend on which other sites there are.
      base: as in `concatenate`.

    Returns:
      A plain LoRA; its `errors` say how far each site is from the combined delta, after the cut to its rank.

    Raises:
      AdapterError: as `concatenate`; an unknown `how`; an argument that it lacks or has no use for; a density or energy
        outside (0, 1]; a rank above min(in, out).
      PlanError: a base that does not fit the plan.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.zeros((1, 4))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params)
      >>> tasks = [Adaptation(plan, {"w": lk.Factors(jnp.ones((1, 1)), jnp.array([b]))})
      ...          for b in ([4.0, 1.0, -3.0, 0.0], [2.0, 0.0, 5.0, 1.0])]
      >>> both = combine(tasks, "ties", density=0.5)
      >>> lk.merge(params, both.factors, both.plan)["w"].round(5).tolist()
      [[3.0, 0.0, 5.0, 0.0]]
    """
    tasks = _tasks(adapters, how, weights, density, disjoint, key, base)
    sites = tasks.adapters[0].plan.sites
    check_rank(rank, sites)
    energy = None if energy is None else check_share("energy", energy)
    if how == "cat" and (rank is not None or energy is not None):
        raise AdapterError("'cat' keeps all rows: it takes neither a rank nor an energy.\n  how='svd' does")
    ranks = {site.path: rank for site in sites}
    if rank is None and energy is None and how not in ("cat", "linear"):
        ranks = {site.path: _highest(tasks.adapters, i) for i, site in enumerate(sites)}
    rows: dict[str, Any] = {}
    errors = {}
    if how in SUMS:
        summed = concatenate(tasks.adapters, tasks.weights, base=base)
        for site in sites:
            leaves = summed.factors[site.path]
            rows[site.path], errors[site.path] = cut(site, Rows(leaves.a, leaves.b), ranks[site.path], energy)
        full = {leaf.path: summed.factors[leaf.path].value for leaf in summed.plan.full}
    else:
        for site in sites:
            delta = tasks.combined(site)
            rows[site.path], errors[site.path] = cut_whole(site, delta, ranks[site.path], energy, delta.dtype)
        full = {leaf.path: tasks.moved(leaf) for leaf in tasks.adapters[0].plan.full}
    return plain([adapter.plan for adapter in tasks.adapters], rows, full, errors)


def combine_into(
    base: Params,
    adapters: Iterable[AnyAdapter],
    how: str,
    *,
    weights: Sequence[Any] | None = None,
    density: float | None = None,
    disjoint: str = "mean",
    key: Array | None = None,
) -> Params:
    """`combine` of every rank, folded into the base: params of the same tree, each summed in fp32 and rounded once.

    Args:
      base: the frozen params; not changed. Quantised parameters of the sites come out restored.
      adapters, how, weights, density, disjoint, key: as in `combine`.

    Raises:
      AdapterError, PlanError: as `combine`.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((1, 2))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params)
      >>> task = Adaptation(plan, {"w": lk.Factors(jnp.ones((1, 1)), jnp.array([[4.0, 1.0]]))})
      >>> combine_into(params, [task], "magnitude_prune", density=0.5)["w"].tolist()
      [[5.0, 1.0]]
    """
    tasks = _tasks(adapters, how, weights, density, disjoint, key, base)
    named, treedef = flatten(base)
    out = dict(named)
    plan = tasks.adapters[0].plan
    for site in plan.sites:
        w = dense(named[site.path])
        merged = moved(site.matrices(w), [jnp.asarray(tasks.combined(site))])
        out[site.path] = site.from_matrices(merged).astype(w.dtype)
    for leaf in plan.full:
        out[leaf.path] = tasks.moved(leaf).astype(named[leaf.path].dtype)
    for path in plan.trained:
        check_result(path, out[path])
    return unflatten(out, treedef)


def _highest(adapters: Sequence[AnyAdapter], i: int) -> int:
    """The highest rank that a setting of the adapters has at site `i`."""
    sites = [adapter.plan.sites[i] for adapter in adapters]
    rank = max(site.rank for site in sites)
    if rank == 0:
        raise AdapterError(f"no adapter has a rank at {sites[0].path!r} ({sites[0].setting.kind}).\n  give rank=")
    return min(rank, sites[0].max_rank)


@dataclass
class _Tasks:
    """Adapters, and how their deltas become one.

    Attributes:
      base: path -> parameter; empty without a base.
      thresholds: of each task, the magnitude below which `trim` drops.
    """

    adapters: list[AnyAdapter]
    how: str
    weights: list[Any]
    density: float
    disjoint: str
    key: Array | None
    base: dict[str, Any]
    thresholds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sites = [{site.path: site for site in adapter.plan.sites} for adapter in self.adapters]

    def delta(self, i: int, where: Site | FullSite) -> np.ndarray:
        """Of task `i` at a parameter: (S, K, N), or of its own shape where it is trained in full."""
        adapter = self.adapters[i]
        if isinstance(where, FullSite):
            return np.asarray(full_delta(where, adapter, self.base))
        site = self.sites[i][where.path]
        return np.asarray(delta_of(site, self.base.get(where.path), adapter.factors[where.path]))

    def combined(self, where: Site | FullSite) -> np.ndarray:
        """The tasks' deltas at a parameter as one."""
        with np.errstate(over="ignore", invalid="ignore"):  # the result is checked
            pruned = [w * self._pruned(i, where) for i, w in enumerate(self.weights)]
            if not self.how.endswith("ties"):
                return np.sum(pruned, axis=0)
            return elect(np.stack(pruned), self.disjoint)

    def moved(self, leaf: FullSite) -> Array:
        """The value of a parameter trained in full."""
        return moved(jnp.asarray(self.base[leaf.path]), [jnp.asarray(self.combined(leaf))])

    def _pruned(self, i: int, where: Site | FullSite) -> np.ndarray:
        delta = self.delta(i, where)
        if self.how in SUMS:
            return delta
        if self.key is None:
            return np.where(np.abs(delta) >= self.thresholds[i], delta, 0)
        key = jax.random.fold_in(site_key(self.key, where.path), i)
        kept = np.asarray(jax.random.bernoulli(key, self.density, delta.shape))
        return np.where(kept, delta, 0) / np.asarray(self.density, delta.dtype)

    def trim(self) -> None:
        """Find each task's threshold, which its share of entries reaches. Holds one task's magnitudes at a time."""
        for i, adapter in enumerate(self.adapters):
            every = np.concatenate([np.abs(self.delta(i, x)).ravel() for x in planned(adapter.plan)])
            kept = max(1, round(self.density * every.size))
            self.thresholds.append(np.partition(every, every.size - kept)[every.size - kept])


def elect(deltas: np.ndarray, disjoint: str = "mean") -> np.ndarray:
    """TIES' second and third step: by entry the sign of the larger total mass, and those that share it.

    Args:
      deltas: (tasks, ...), trimmed and weighted.
      disjoint: "mean" over the tasks that share the sign, or "sum".

    Returns:
      (...); 0 where no task has an entry, or where they cancel.

    Example:
      >>> elect(np.array([[3.0, -1.0, 0.0], [1.0, 4.0, -2.0], [-1.0, 2.0, 0.0]])).tolist()
      [2.0, 3.0, -2.0]
    """
    sign = np.sign(np.sum(deltas, axis=0))
    agree = (np.sign(deltas) == sign) & (sign != 0)
    total = np.sum(np.where(agree, deltas, 0), axis=0)
    if disjoint == "sum":
        return total
    return total / np.maximum(np.sum(agree, axis=0), 1).astype(deltas.dtype)


def _tasks(
    adapters: Iterable[AnyAdapter], how: Any, weights: Any, density: Any, disjoint: Any, key: Any, base: Any
) -> _Tasks:
    """What `combine` was asked for.

    Raises:
      AdapterError: as `combine`.
    """
    listed = checked(adapters)
    if not isinstance(how, str) or how not in WAYS:
        raise AdapterError(f"how is {how!r}; choose from {', '.join(WAYS)}.")
    numbers = check_weights(weights, len(listed))
    if any(isinstance(x, jax.core.Tracer) for x in (*numbers, *jax.tree.leaves([a.factors for a in listed]))):
        raise AdapterError("combine works on values, outside of jit and grad.\n  concatenate may be traced")
    if disjoint not in ("mean", "sum"):
        raise AdapterError(f"disjoint is {disjoint!r}; choose from mean, sum.")
    prunes, draws = how not in SUMS, how.startswith("dare")
    if disjoint != "mean" and not how.endswith("ties"):
        raise AdapterError(f"disjoint={disjoint!r} has no use in {how!r}: it elects no signs.")
    for name, given, needed in (("density", density, prunes), ("key", key, draws)):
        if (given is not None) != needed:
            why = "needs one" if needed else "has no use for it"
            raise AdapterError(f"{name} is {'missing' if needed else 'given'}, and {how!r} {why}.")
    share = check_share("density", density) if prunes else 1.0
    if draws:
        check_key(key)
    if not listed[0].plan.trained:
        raise AdapterError("the adapters train nothing: there is nothing to combine.")
    named = bases(listed[0], base)
    tasks = _Tasks(listed, how, numbers, share, disjoint, key, named)
    if prunes and not draws:
        tasks.trim()
    return tasks
