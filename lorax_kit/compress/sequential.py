"""Compression one group of parameters after another, each calibrated on what the compressed ones before it give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from lorax_kit.calibration.arguments import InputWeight, batches_of, check_function, groups_of, shown
from lorax_kit.calibration.calibrate import calibrate
from lorax_kit.compress.replace import CompressPlan, check_plan, compress
from lorax_kit.core.paths import Params
from lorax_kit.core.site import Site
from lorax_kit.errors import CompressError
from lorax_kit.transform.adapt import compressed


def compress_sequentially(
    fn: Callable[..., Any],
    params: Params,
    plan: CompressPlan,
    batches: Iterable[Any],
    groups: Sequence[str],
    *,
    loss: Callable[[Any, Any], Any] | None = None,
    weight: InputWeight | None = None,
    progress: bool = True,
) -> Params:
    """`compress`, with moments of the inputs that the sites of a group will have, not of those of the dense model.

    Args:
      fn: `fn(params, batch)`, of dense params.
      params: left as they are.
      plan: from `plan_ranks`, whose ranks stay.
      batches: calibration data, read once for each group. A group's program ends where its last input is known.
      groups: a pattern for each (`"layer_0/**"`), in the order in which `fn` uses them; together they name every site.
      loss, weight: as in `calibrate`: for "fisher", and to leave padding out.
      progress: show a bar.

    Returns:
      What `compress` returns.

    Raises:
      CompressError: a group without a site, a site in no group or in two; what `calibrate` and `compress` raise.

    Example:
      >>> import jax.numpy as jnp, lorax_kit as lk
      >>> params, x = {"up": jnp.eye(6), "down": jnp.eye(6)}, jnp.arange(48.0).reshape(8, 6) % 7
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> sites = lk.resolve(lk.Spec({"*": lk.LoRA(rank=1)}), params, fn, x)
      >>> plan = CompressPlan(method="whitened", sites=sites, ranks={"up": 2, "down": 2})
      >>> small = compress_sequentially(fn, params, plan, [x], ["up", "down"], progress=False)
      >>> small["down"].rank
      2
    """
    check_function("fn", fn, "fn(params, batch)")
    check_plan(plan)
    if isinstance(groups, str) or not isinstance(groups, Sequence) or not all(isinstance(g, str) for g in groups):
        raise CompressError(f"the groups are {shown(groups)}; give a list of patterns, one for each group.")
    batches = list(batches_of("the calibration batches", batches))  # read once for each group
    if not batches:
        raise CompressError("there are no calibration batches.")
    ranks, small = dict(plan.ranks), params
    for group_sites in tqdm(
        _grouped(plan.sites.sites, groups), desc="compressing in turn", unit="group", disable=None if progress else True
    ):
        chosen = {site.path: ranks[site.path] for site in group_sites if site.path in ranks}
        if not chosen:
            continue
        sites = replace(plan.sites, sites=tuple(site for site in group_sites if site.path in chosen), full=())
        stats = calibrate(compressed(fn), small, sites, batches, loss=loss, weight=weight, progress=False)
        small = compress(small, CompressPlan(method=plan.method, sites=sites, ranks=chosen), stats)
    return small


def _grouped(sites: Sequence[Site], groups: Sequence[str]) -> list[list[Site]]:
    """The sites of each group."""
    group_of = groups_of([site.path for site in sites], groups)
    grouped = [[site for site in sites if group_of[site.path] == group] for group in groups]
    for group, own in zip(groups, grouped, strict=True):
        if not own:
            raise CompressError(f"the group {group!r} holds none of the plan's sites.")
    return grouped
