"""A plan: a spec resolved against params, as a static, hashable tuple of sites."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp

from lorax_kit.core.errors import PlanError
from lorax_kit.core.paths import Params, closest, paths
from lorax_kit.core.patterns import expand_braces, matches
from lorax_kit.core.spec import Full, LoRA, Setting, Spec


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Which axes of a parameter are contracted with its input, which make its output, which are stacked.

    `stack` axes (scanned layers, experts) hold independent matrices: both factors carry them.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stack: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Site:
    """One adapted parameter.

    Attributes:
      path: name of the leaf in the params.
      shape, dtype: of the parameter.
      axes: how the function contracts it.
      use: the function's first use: "product", "lookup" (an embedding, so `b` is drawn and `a` starts at zero), or
        "other" (a convolution; or what is materialised, whose last axis is then taken for the output).
      setting: rank, alpha, variant and the rest, from the rule that matched.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: Axes
    use: str
    setting: LoRA

    def _sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in axes)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Sizes of the contracted axes."""
        return self._sizes(self.axes.inputs)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Sizes of the output axes."""
        return self._sizes(self.axes.outputs)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Sizes of the stacked axes."""
        return self._sizes(self.axes.stack)

    @property
    def a_shape(self) -> tuple[int, ...]:
        """Shape of `a`: (rank, *stack, *in)."""
        return (self.setting.rank, *self.stack_shape, *self.in_shape)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """Shape of `b`: (rank, *stack, *out)."""
        return (self.setting.rank, *self.stack_shape, *self.out_shape)

    @property
    def lookup(self) -> bool:
        """Whether rows are looked up."""
        return self.use == "lookup"

    @property
    def scale(self) -> float:
        """s in W + s * delta."""
        return self.setting.scale

    @property
    def max_rank(self) -> int:
        """min(in, out): the rank above which factors hold nothing new."""
        return min(prod(self.in_shape), prod(self.out_shape))


@dataclass(frozen=True, kw_only=True)
class FullSite:
    """One parameter trained in full."""

    path: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything static about an adaptation; hashable, so it may be closed over or passed as static to jit."""

    sites: tuple[Site, ...]
    full: tuple[FullSite, ...]
    compute_dtype: str | None = None

    def site(self, path: str) -> Site:
        """The site at `path`."""
        return {s.path: s for s in self.sites}[path]

    @property
    def trained(self) -> tuple[str, ...]:
        """Paths of all trained parameters, low-rank and full."""
        return (*(s.path for s in self.sites), *(f.path for f in self.full))


def match(spec: Spec, params: Params) -> dict[str, Setting]:
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
    chosen: dict[str, Setting] = {}
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
        found = [p for p in names if matches(alternative, p)]
        if not found:
            which = "" if alternative == pattern else f" with {alternative!r}"
            raise PlanError(
                f"{who} matches no parameter{purpose}{which}.\n"
                f"  closest: {closest(alternative, names)}\n"
                "  see them all: lk.paths(params)   or   lorax-kit inspect MODEL"
            )
        hits += found
    return hits


def _check_target(path: str, leaf: jax.ShapeDtypeStruct, setting: Setting, rule: str) -> None:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise PlanError(
            f"{rule} targets {path!r}, whose dtype is {leaf.dtype}: only float parameters can be trained.\n"
            f"  exclude it: Spec(..., exclude=[{path!r}])"
        )
    if isinstance(setting, LoRA) and len(leaf.shape) < 2:
        raise PlanError(
            f"{rule} targets {path!r} of shape {leaf.shape}: a low-rank update needs at least 2 axes.\n"
            "  narrow the pattern (for example to '.../kernel'), or give this parameter Full()"
        )


def make_plan(spec: Spec, params: Params, axes: dict[str, tuple[Axes, str]] | None = None) -> Plan:
    """Build the plan from matched settings and the axes found by tracing (`lorax_kit.transform.resolve`).

    Args:
      axes: path -> (axes, use). None: no function was traced, so every low-rank target must be a
        matrix in the (in, out) layout of JAX kernels.

    Raises:
      PlanError: a rank above min(in, out), or an N-D target without traced axes.
    """
    arrays = paths(params)
    sites, full = [], []
    for path, setting in match(spec, params).items():
        leaf = arrays[path]
        if isinstance(setting, Full):
            dtype = setting.dtype or str(leaf.dtype)
            if jnp.promote_types(dtype, leaf.dtype) != jnp.dtype(dtype):
                raise PlanError(
                    f"{path!r} is {leaf.dtype}; Full(dtype={dtype!r}) would round it.\n"
                    "  give a dtype at least as wide, or none"
                )
            full.append(FullSite(path=path, shape=leaf.shape, dtype=dtype))
            continue
        if axes is None:
            if len(leaf.shape) != 2:
                raise PlanError(
                    f"{path!r} has shape {leaf.shape}: which axes are contracted is known only to the function.\n"
                    "  give it: lk.resolve(spec, params, apply_fn, *inputs)"
                )
            found, use = Axes(inputs=(0,), outputs=(1,)), "product"
        else:
            found, use = axes[path]
        site = Site(path=path, shape=leaf.shape, dtype=str(leaf.dtype), axes=found, use=use, setting=setting)
        if setting.rank > site.max_rank:
            raise PlanError(
                f"rank {setting.rank} at {path!r} is above min(in, out) = {site.max_rank} "
                f"(in {site.in_shape}, out {site.out_shape}).\n"
                f"  lower the rank, or train this parameter with Full()"
            )
        sites.append(site)
    return Plan(sites=tuple(sites), full=tuple(full), compute_dtype=spec.compute_dtype)
