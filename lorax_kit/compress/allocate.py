"""How many columns each matrix keeps under one budget of parameters.

A matrix of m x n costs r (m + n) parameters at rank r, m n dense; its loss at rank r is what its truncation drops.
The whole is minimised over all matrices at once: on the lower convex hull of each matrix's (cost, loss), which ends in
"dense, no loss", taking segments by falling gain per parameter is optimal for every budget that ends between two
segments (Lagrange; Everett, Operations Research 11, 1963), and falls short by less than one segment elsewhere. What
is then left of the budget is given to the next best ranks that fit.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lorax_kit.compress.arguments import check_count, check_share, check_word
from lorax_kit.errors import CompressError

ALLOCATIONS = ("loss", "energy", "uniform")


class Candidate(NamedTuple):
    """One site to be given a rank.

    Attributes:
      losses: (R + 1,) what truncating at rank 0, 1, ..., R drops, over all its stacked matrices.
      per_rank: cost of one more rank, over the stack: in parameters, or in bytes.
      dense: of the site.
    """

    losses: np.ndarray
    per_rank: int
    dense: int

    def times(self, size: int) -> Candidate:
        """At so many bytes per parameter."""
        return self._replace(per_rank=size * self.per_rank, dense=size * self.dense)

    @property
    def most(self) -> int:
        """The highest rank that has fewer parameters than the site itself."""
        return min((self.dense - 1) // self.per_rank, len(self.losses) - 1)


def candidate(spectra: np.ndarray, inputs: int, outputs: int) -> Candidate:
    """From singular values (S, R) of S stacked matrices (inputs, outputs)."""
    squares = np.sum(spectra**2, axis=0)
    tail = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])
    return Candidate(tail, len(spectra) * (inputs + outputs), len(spectra) * inputs * outputs)


def allocate(
    candidates: Mapping[str, Candidate], keep: float, how: str = "loss", minimum: int = 1
) -> dict[str, int | None]:
    """A rank for each site, None to leave it dense, with at most `keep` of all their parameters.

    Args:
      keep: share of the sites' parameters, in (0, 1].
      how: "loss" minimises the sum of what truncations drop; "energy" the sum of the shares of each site's own energy
        that they drop; "uniform" keeps `keep` of every site. "loss" trusts that sites are comparable: outputs in one
        unit for "whitened", gradients for "fisher". Where a model has converged, gradients are noise and their size
        says little of what a site is worth: prefer "energy" for "fisher" and "svd" there, above all at a low `keep`.
      minimum: the least rank.

    Raises:
      CompressError: an unknown way, a share out of range, or a budget below the minimum ranks.

    Example:
      >>> steep, flat = candidate(np.array([[8.0, 0.1, 0.1]]), 9, 3), candidate(np.array([[2.0, 2.0, 2.0]]), 9, 3)
      >>> allocate({"steep": steep, "flat": flat}, keep=0.75)
      {'steep': 1, 'flat': None}
    """
    check_word("allocation", how, ALLOCATIONS)
    keep, minimum = check_share("keep", keep), check_count("minimum", minimum)
    if not candidates:
        raise CompressError("there are no candidates to give ranks.")
    budget = int(keep * sum(c.dense for c in candidates.values()) + 1e-6)
    least = {path: min(minimum, c.most) for path, c in candidates.items()}
    for path, rank in least.items():
        if rank < minimum:
            raise CompressError(f"rank {minimum} at {path!r} has more parameters than the matrix itself; leave it out.")
    if how == "uniform":
        ranks: dict[str, int | None] = {
            p: None if keep == 1 else max(int(keep * c.dense / c.per_rank + 1e-9), 0) for p, c in candidates.items()
        }
        short = [p for p, r in ranks.items() if r is not None and r < minimum]
    else:
        scale = {p: c.losses[0] if how == "energy" and c.losses[0] > 0 else 1.0 for p, c in candidates.items()}
        ranks, short = _solved(candidates, scale, least, budget), []
        if cost(candidates, dict(least)) > budget:
            short = list(candidates)
    if short:
        needed = cost(candidates, dict(least)) / sum(c.dense for c in candidates.values())
        raise CompressError(
            f"keep={keep:g} is impossible: rank {minimum} everywhere already keeps {needed:.4f} of the parameters"
            + (f", and {short[0]!r} would fall below it." if how == "uniform" else ".")
        )
    return ranks


def cost(candidates: Mapping[str, Candidate], ranks: Mapping[str, int | None]) -> int:
    """Parameters at these ranks."""
    return sum(c.dense if (rank := ranks[p]) is None else rank * c.per_rank for p, c in candidates.items())


def _points(c: Candidate, least: int, scale: float) -> list[tuple[int, float, int | None]]:
    """(cost, loss, rank) on the lower convex hull, from the least rank to dense."""
    points: list[tuple[int, float, int | None]] = [
        (r * c.per_rank, float(c.losses[r]) / scale, r) for r in range(least, c.most + 1)
    ]
    points.append((c.dense, 0.0, None))
    hull: list[tuple[int, float, int | None]] = []
    for x, y, rank in points:
        while len(hull) > 1:
            (x0, y0, _), (x1, y1, _) = hull[-2:]
            if (y1 - y0) * (x - x1) < (y - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y, rank))
    return hull


def _solved(
    candidates: Mapping[str, Candidate], scale: Mapping[str, float], least: Mapping[str, int], budget: int
) -> dict[str, int | None]:
    hulls = {p: _points(c, least[p], scale[p]) for p, c in candidates.items()}
    ranks: dict[str, int | None] = dict(least)
    left = budget - cost(candidates, ranks)
    queue: list[tuple[float, int, str, int]] = []

    def push(order: int, path: str, at: int) -> None:
        hull = hulls[path]
        if at + 1 < len(hull):
            (x0, y0, _), (x1, y1, _) = hull[at], hull[at + 1]
            heapq.heappush(queue, ((y1 - y0) / (x1 - x0), order, path, at))

    for order, path in enumerate(candidates):
        push(order, path, 0)
    while queue:
        _, order, path, at = heapq.heappop(queue)
        price = hulls[path][at + 1][0] - hulls[path][at][0]
        if price <= left:
            left -= price
            ranks[path] = hulls[path][at + 1][2]
            push(order, path, at + 1)
    return _filled(candidates, scale, ranks, left)


def _filled(
    candidates: Mapping[str, Candidate], scale: Mapping[str, float], ranks: dict[str, int | None], left: int
) -> dict[str, int | None]:
    """What is left of the budget, given rank by rank to what gains most."""

    def gain(path: str) -> float:
        c, rank = candidates[path], ranks[path]
        if rank is None or rank + 1 > c.most or c.per_rank > left:
            return 0.0
        return float(c.losses[rank] - c.losses[rank + 1]) / scale[path] / c.per_rank

    while True:
        best = max(ranks, key=gain)
        rank = ranks[best]
        if gain(best) <= 0 or rank is None:
            return ranks
        ranks[best] = rank + 1
        left -= candidates[best].per_rank
