"""A plan: a spec resolved against params, as a static, hashable tuple of sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from lorax_kit.core.method import leaf_shapes, max_rank
from lorax_kit.core.paths import Params, closest, paths
from lorax_kit.core.site import Axes, FullSite, Site
from lorax_kit.core.specs.patterns import expand_braces, literal, matches
from lorax_kit.core.specs.setting import Full, Setting
from lorax_kit.core.specs.spec import AnySetting, Spec
from lorax_kit.errors import LoraxError, PlanError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything static about an adaptation; hashable, so it may be closed over or passed as static to jit.

    Attributes:
      sites: what a method adapts.
      full: what is trained in full.
      spec: the spec that was resolved; what an adapter on disk keeps.
    """

    sites: tuple[Site, ...]
    full: tuple[FullSite, ...]
    spec: Spec

    @property
    def compute_dtype(self) -> str | None:
        """Of the spec."""
        return self.spec.compute_dtype

    @property
    def capped(self) -> dict[str, tuple[int, int]]:
        """Path -> (the rank asked for, the highest that the site can hold), where the spec's `cap_ranks` lowered it."""
        out = {}
        for site in self.sites:
            asked = next(
                s for pattern, s in self.spec.rules if any(matches(x, site.path) for x in expand_braces(pattern))
            )
            rank = int(getattr(asked, "rank", 0))
            if rank > site.rank:
                out[site.path] = (rank, site.rank)
        return out

    def site(self, path: str) -> Site:
        """The site at `path`."""
        return {s.path: s for s in self.sites}[path]

    @property
    def trained(self) -> tuple[str, ...]:
        """Paths of all trained parameters, low-rank and full."""
        return (*(s.path for s in self.sites), *(f.path for f in self.full))


def plan_of_sites(sites: Sequence[Site], full: Sequence[FullSite], compute_dtype: str | None) -> Plan:
    """A plan of these sites, whose spec has a rule for each."""
    rules: list[tuple[str, AnySetting]] = [(literal(site.path), site.setting) for site in sites]
    rules += [(literal(leaf.path), Full(dtype=leaf.dtype, trained=leaf.trained)) for leaf in full]
    return Plan(sites=tuple(sites), full=tuple(full), spec=Spec(rules, compute_dtype=compute_dtype))


def match(spec: Spec, params: Params) -> dict[str, AnySetting]:
    """Which setting each parameter of `params` gets: path -> setting, in the order of the params.

    Raises:
      PlanError: a rule, one alternative of a rule, or an exclude pattern that matches nothing; a rule
        whose every match is taken by earlier rules; a low-rank target that is not a float array of at
        least two axes; a full target that is not float.
    """
    arrays = paths(params)
    names = list(arrays)
    excluded: set[str] = set()
    for pattern in spec.exclude:
        excluded.update(matched(f"exclude {pattern!r}", pattern, names))
    chosen: dict[str, AnySetting] = {}
    for i, (pattern, setting) in enumerate(spec.rules, 1):
        hits = matched(f"rule {i} {pattern!r}", pattern, names)
        fresh = [p for p in hits if p not in chosen and p not in excluded]
        if not fresh:
            raise PlanError(
                f"rule {i} {pattern!r} changes nothing: its {len(hits)} matches are excluded or taken earlier.\n"
                "  the first rule that matches wins: move this rule up, or remove it"
            )
        for path in fresh:
            _check_target(path, arrays[path], setting, f"rule {i} {pattern!r}")
            chosen[path] = setting
    return {path: chosen[path] for path in names if path in chosen}


def matched(who: str, pattern: str, names: list[str], purpose: str = "") -> list[str]:
    """The paths that each alternative of a pattern matches.

    Raises:
      PlanError: an alternative that matches nothing; `who` and `purpose` say whose it is and what for.
    """
    hits = []
    for alternative in expand_braces(pattern):
        matching = [p for p in names if matches(alternative, p)]
        if not matching:
            which = "" if alternative == pattern else f" with {alternative!r}"
            raise PlanError(
                f"{who} matches no parameter{purpose}{which}.\n"
                f"  closest: {closest(alternative, names)}\n"
                "  see them all: lk.paths(params)   or   lorax-kit inspect MODEL"
            )
        hits += matching
    return hits


def _check_target(path: str, leaf: jax.ShapeDtypeStruct, setting: AnySetting, rule: str) -> None:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise PlanError(
            f"{rule} targets {path!r}, whose dtype is {leaf.dtype}: only float parameters can be trained.\n"
            f"  exclude it: Spec(..., exclude=[{path!r}])"
        )
    if isinstance(setting, Setting) and len(leaf.shape) < 2:
        raise PlanError(
            f"{rule} targets {path!r} of shape {leaf.shape}: a low-rank update needs at least 2 axes.\n"
            "  narrow the pattern (for example to '.../kernel'), or give this parameter Full()"
        )


def make_plan(spec: Spec, params: Params, axes: dict[str, tuple[Axes, str]] | None = None) -> Plan:
    """Build the plan from matched settings and the axes found by tracing (`lorax_kit.transform.resolve`).

    Args:
      axes: path -> (axes, use). None: no function was traced, so every target must be an (in, out) matrix whose
        shape or name (`kernel`) tells so, or have `inputs` in its setting.

    Raises:
      PlanError: a rank above what the method can hold, or a target without traced axes whose layout nothing tells.
    """
    arrays = paths(params)
    sites, full = [], []
    for path, setting in match(spec, params).items():
        leaf = arrays[path]
        if isinstance(setting, Full):
            dtype = setting.dtype or ("float32" if jnp.finfo(leaf.dtype).bits < 32 else str(leaf.dtype))
            if not jnp.can_cast(leaf.dtype, dtype, "safe"):
                raise PlanError(
                    f"{path!r} is {leaf.dtype}; Full(dtype={dtype!r}) would round it.\n"
                    "  give a dtype at least as wide, or none"
                )
            full.append(FullSite(path=path, shape=leaf.shape, dtype=dtype, trained=setting.trained))
            continue
        site_axes, use = _untraced(path, leaf.shape, setting) if axes is None else axes[path]
        site = Site(path=path, shape=leaf.shape, dtype=str(leaf.dtype), axes=site_axes, use=use, setting=setting)
        if site.rank > (limit := max_rank(site)):
            if limit < 1:
                raise PlanError(
                    f"{site.setting.kind} cannot adapt {path!r}: the highest rank that it holds there is {limit} "
                    f"(in {site.in_shape}, out {site.out_shape}).\n"
                    "  exclude it, give it another method, or train it with Full()"
                )
            if not spec.cap_ranks:
                raise PlanError(
                    f"rank {site.rank} at {path!r} is above {_limit_of(site, limit)} "
                    f"(in {site.in_shape}, out {site.out_shape}).\n"
                    "  lower the rank, leave the parameter out of the pattern, cap ranks (Spec(..., cap_ranks=True)),\n"
                    "  or train it with Full()"
                )
            site = _capped(site, limit)
        leaf_shapes(site)  # raises where the method cannot adapt such a parameter
        sites.append(site)
    return Plan(sites=tuple(sites), full=tuple(full), spec=spec)


def _capped(site: Site, limit: int) -> Site:
    """The site at the highest rank, up to `limit`, that its method and its start hold; some hold even ranks alone.

    Raises:
      PlanError: they hold neither `limit` nor the rank below it.
    """
    refused: LoraxError | None = None
    for rank in range(limit, max(limit - 2, 0), -1):
        try:
            made = replace(site, setting=replace(site.setting, rank=rank))  # type: ignore[call-arg]
            leaf_shapes(made)
            return made
        except LoraxError as e:
            refused = refused or e
    why = str(refused).splitlines()[0].removeprefix(f"{site.path!r}: ")
    raise PlanError(
        f"{site.setting.kind} cannot adapt {site.path!r} at rank {limit}, {_limit_of(site, limit)}: {why}\n"
        "  exclude it, give it another method or start, or train it with Full()"
    )


def _limit_of(site: Site, limit: int) -> str:
    if limit == site.max_rank:
        return f"min(in, out) = {limit}"
    return f"{limit}, the most that {site.setting.kind} can hold there"


def _untraced(path: str, shape: tuple[int, ...], setting: Setting) -> tuple[Axes, str]:
    """The axes of a parameter whose function is not known, and its use: a leaf named `embedding` is looked up.

    Raises:
      PlanError: neither the setting, nor the shape and the name (a `kernel` is (in, out)) tell them.
    """
    if setting.inputs is not None:
        rest = tuple(i for i in range(len(shape)) if i not in setting.inputs)
        if not rest or max(setting.inputs) >= len(shape):
            raise PlanError(f"{path!r} has {len(shape)} axes; inputs={setting.inputs} must name some, and not all.")
        return Axes(inputs=setting.inputs, outputs=rest), "product"
    if len(shape) != 2:
        raise PlanError(
            f"{path!r} has shape {shape}: which axes are contracted is known only to the function.\n"
            "  give it: lk.resolve(spec, params, apply_fn, *inputs)"
        )
    names = [name for name in path.split("/") if name != "value"]  # NNX ends every path in `value`
    if shape[0] == shape[1] and names[-1] != "kernel":
        raise PlanError(
            f"{path!r} has shape {shape}: neither shape nor name tells its inputs from its outputs.\n"
            "  give the function that uses it: lk.resolve(spec, params, apply_fn, *inputs)\n"
            "  or say which axis is contracted: inputs=(0,) in its setting"
        )
    return Axes(inputs=(0,), outputs=(1,)), "lookup" if names[-1] == "embedding" else "product"
