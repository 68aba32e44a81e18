"""Numbers behind the figures: losses in bins of steps, rate x rank grids, spectra averaged over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from lorax_kit.analysis import effective_rank
from lorax_kit.report.conditions import Condition, Family, Summary
from lorax_kit.report.run_folder import RunFolder

Array = np.ndarray
BINS = 25  # fewer, and falls are lost; more, and the noise of single batches hides the ranks


def binned_curves(run: RunFolder, condition: Condition, key: str) -> list[tuple[Array, Array]]:
    """(steps, losses) of every seed of a condition, averaged within at most `BINS` bins of steps.

    Bins are the same for all seeds; a bin's place is the mean of its steps. A loss that is not finite ends
    its curve. Seeds without a record of `key` are left out.
    """
    lines: list[Array] = []
    for trial in condition.trials:
        points: list[tuple[float, float]] = []
        for record in run.curves:
            if record["trial"] == trial["trial"] and record.get(key) is not None:
                if not math.isfinite(record[key]):
                    break
                points.append((record["step"], record[key]))
        if points:
            lines.append(np.array(points, dtype=np.float64))
    if max(map(len, lines), default=0) <= BINS:
        return [(line[:, 0], line[:, 1]) for line in lines]
    last = max(line[-1, 0] for line in lines)
    binned = []
    for line in lines:
        place = np.minimum((line[:, 0] / last * BINS).astype(int), BINS - 1)
        binned.append(
            (
                np.array([line[place == p, 0].mean() for p in np.unique(place)]),
                np.array([line[place == p, 1].mean() for p in np.unique(place)]),
            )
        )
    return binned


def rate_map(summary: Summary, family: Family) -> tuple[Array, Array]:
    """Mean of the validation metric, as it is drawn, and number of lost seeds, each (rates, ranks).

    Combinations that were not run are nan and 0.
    """
    values = np.full((len(summary.rates), len(summary.ranks)), np.nan)
    lost = np.zeros(values.shape, int)
    for condition in summary.conditions:
        if condition.family == family:
            cell = summary.rates.index(condition.lr), summary.ranks.index(condition.rank)
            values[cell] = summary.measure.factor * condition.mean(summary.choice)
            lost[cell] = len(condition.trials) - len(condition.done)
    return values, lost


def mean_spectra(run: RunFolder, condition: Condition) -> dict[str, Array]:
    """Site -> singular values, mean over the seeds of a condition that recorded them, largest first."""
    names = {trial["trial"] for trial in condition.done}
    by_site: dict[str, list[list[float]]] = {}
    for record in run.spectra:
        if record["trial"] in names and record["singular_values"]:
            by_site.setdefault(record["site"], []).append(record["singular_values"])
    means = {}
    for site, spectra in by_site.items():
        shortest = min(map(len, spectra))
        means[site] = np.mean([sorted(s, reverse=True)[:shortest] for s in spectra], axis=0)
    return means


def effective_ranks(summary: Summary) -> tuple[list[str], list[int], Array]:
    """Sites, ranks, and the (sites, ranks) mean effective rank over seeds for the best family's ladder.

    Records without "effective_rank" have it computed from their singular values.
    """
    values: dict[tuple[str, int], list[float]] = {}
    for condition in summary.ladder:
        names = {trial["trial"] for trial in condition.done}
        for record in summary.run.spectra:
            if record["trial"] in names:
                value = record.get("effective_rank")
                if value is None:
                    value = float(effective_rank(jnp.asarray(record["singular_values"])))
                values.setdefault((record["site"], condition.rank), []).append(value)
    sites = list(dict.fromkeys(site for site, _ in values))
    ranks = sorted({rank for _, rank in values})
    means = [[np.mean(values.get((site, rank), [np.nan])) for rank in ranks] for site in sites]
    return sites, ranks, np.array(means, dtype=np.float64).reshape(len(sites), len(ranks))


def mean_overlaps(summary: Summary) -> dict[tuple[int, int], Array]:
    """(rank, rank) -> phi, the mean over sites and pairs of trials; for the chosen conditions of the best family.

    The first rank is never the larger one. Grids of different sizes are cut to the smallest; an entry that no record
    has is nan.
    """
    names = {trial["trial"] for condition in summary.ladder for trial in condition.done}
    overlaps: dict[tuple[int, int], list[Array]] = {}
    for record in summary.run.overlaps:
        if {record["trial_i"], record["trial_j"]} <= names:
            phi = np.array(record["phi"], dtype=np.float64)  # null becomes nan
            ranks = int(record["rank_i"]), int(record["rank_j"])
            if ranks[0] > ranks[1]:
                ranks, phi = ranks[::-1], phi.T
            overlaps.setdefault(ranks, []).append(phi)
    means = {}
    for ranks, grids in sorted(overlaps.items()):
        rows, columns = (min(grid.shape[axis] for grid in grids) for axis in (0, 1))
        stack = np.stack([grid[:rows, :columns] for grid in grids])
        count = np.isfinite(stack).sum(axis=0)
        means[ranks] = np.where(count > 0, np.nansum(stack, axis=0) / np.maximum(count, 1), np.nan)
    return means


def short_names(sites: Sequence[str]) -> list[str]:
    """Site paths without the leading and trailing parts they all share.

    Example:
      >>> short_names(["encoder/layer_0/query/kernel", "encoder/layer_1/query/kernel"])
      ['layer_0', 'layer_1']
    """
    if len(sites) < 2:
        return list(sites)
    parts = [site.split("/") for site in sites]
    head = _shared(parts)
    tail = _shared([part[head:][::-1] for part in parts])
    return ["/".join(part[head : len(part) - tail]) or part[-1] for part in parts]


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many leading elements all sequences have in common."""
    count = 0
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        count += 1
    return count
