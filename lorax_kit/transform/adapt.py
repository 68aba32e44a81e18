"""`adapt`: the same function with low-rank parameters, by tracing it; the model is never edited."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax import Array

from lorax_kit.arrays.placement import alike, everywhere, partitioned
from lorax_kit.core.leaves import FactorTree, FullLeaf, check_factors, check_key, site_key
from lorax_kit.core.lowrank import LowRank, dense
from lorax_kit.core.merge import check_params
from lorax_kit.core.method import update_of
from lorax_kit.core.paths import Params, flatten, unflatten
from lorax_kit.core.plan import Plan
from lorax_kit.core.quantised import Quantised
from lorax_kit.core.site import Site
from lorax_kit.errors import PlanError
from lorax_kit.transform.base import Dense, base_of
from lorax_kit.transform.context import NO_INPUT, Context
from lorax_kit.transform.cost import Costs, measured_costs
from lorax_kit.transform.kernels import KERNELS
from lorax_kit.transform.trace import run
from lorax_kit.transform.weight import Weight, frozen_weights, lowrank_weight, make_weight


@dataclass(frozen=True)
class Adapted:
    """A function of (base, factors, *inputs); made by `adapt`."""

    fn: Callable[..., Any]
    plan: Plan
    kernel: str = "auto"
    trials: int = 1
    recompute: bool | str = True
    costs: Costs | None = None
    scale: Any = None
    dropout: Any = None

    def __repr__(self) -> str:
        # JAX writes what it traces into its messages, and a bound method's own text may hold whole arrays.
        return f"adapt({getattr(self.fn, '__qualname__', type(self.fn).__name__)})"

    def __call__(
        self, base: Params, factors: FactorTree, *args: Any, dropout_key: Array | None = None, **kwargs: Any
    ) -> Any:
        """`fn` as if its params were `merge(base, factors, plan)`; inputs and outputs are those of `fn`."""
        with _forward_mode("adapt(fn, plan, kernel='plain')", self.kernel):
            out, ctx = self.traced(base, factors, args, kwargs, dropout_key)
        if undropped := sorted({use.path for use in ctx.uses.values() if NO_INPUT in use.note}):
            warnings.warn(
                f"dropout does nothing at {undropped[0]!r}"
                + (f" and {len(undropped) - 1} more" if len(undropped) > 1 else "")
                + ": no input meets it where it is used. lk.explain(adapted, ..., dropout_key=key) says how; "
                "give such parameters dropout=0",
                stacklevel=2,
            )
        return out

    def traced(
        self, base: Params, factors: FactorTree, args: tuple[Any, ...], kwargs: dict[str, Any], key: Array | None = None
    ) -> tuple[Any, Context]:
        """The outputs, and the record of how each site was used (`lk.explain` reads it)."""
        check_factors(self.plan, factors)
        if key is not None:
            check_key(key, "dropout_key")
        named, treedef = flatten(base)
        check_params(named, self.plan)
        leaves = dict(named)
        for full in self.plan.full:
            leaf = factors[full.path]
            assert isinstance(leaf, FullLeaf)
            leaves[full.path] = leaf.value.astype(named[full.path].dtype)  # as merge does
        weights = {}
        for site in self.plan.sites:
            # Within shard_map factors may differ by device (their gradients are each device's own), and the base not.
            leaves[site.path], own = alike((leaves[site.path], factors[site.path]))
            weights[site.path] = _placed_weight(site, leaves[site.path], own, (self.scale, self.dropout), key)
        sites = set(weights)
        weights |= frozen_weights(leaves, sites)
        if not weights:
            return self.fn(unflatten(leaves, treedef), *args, **kwargs), Context()
        recompute = self.recompute if self.kernel != "plain" else False  # forward mode has no use for it
        ctx = Context(
            kernel=self.kernel,
            trials=self.trials,
            compute_dtype=self.plan.compute_dtype,
            costs=measured_costs(jax.default_backend()) if self.costs is None else self.costs,
            recompute=recompute,
        )
        out = run(ctx, self.fn, leaves, treedef, weights, args, kwargs)
        unused = sites - {use.path for use in ctx.uses.values()}
        if unused:
            raise PlanError(
                f"the function does not use {min(unused)!r} for these inputs, though the plan adapts it.\n"
                "  resolve the spec with the inputs you call it with, or exclude the parameter"
            )
        return out, ctx


def _placed_weight(site: Site, base: Any, leaves: Any, given: tuple[Any, Any], key: Array | None) -> Weight:
    """The weight of a site; on a mesh with explicit axes its factors and gains lie on all devices.

    Args:
      given: (scale, dropout) in place of the site's own; None: its own.
    """

    def placed(weight: Weight) -> Weight:
        place = everywhere((base, leaves))
        rest: Weight = place(replace(weight, base=None))  # type: ignore[arg-type]  # None: no leaf
        return replace(rest, base=place(weight.base) if isinstance(base, Quantised) else Dense(base))

    weight: Weight = partitioned(partial(_weight, site), placed, base, leaves, given, key)
    return weight


def _weight(site: Site, base: Any, leaves: Any, given: tuple[Any, Any], key: Array | None) -> Weight:
    w, (scale, rate) = dense(base), given
    drops = key is not None and (site.dropout > 0 or rate is not None)
    scale, rate = (own if x is None else x for own, x in ((site.scale, scale), (site.dropout, rate)))
    update = update_of(site, w, leaves, scale)
    dropout_key = site_key(key, site.path) if key is not None and drops else None
    return make_weight(site, base_of(base), update, scale, dropout_key, rate)


@contextmanager
def _forward_mode(way_out: str, kernel: str) -> Iterator[None]:
    """Say what is left to do where JAX refuses forward mode."""
    try:
        yield
    except TypeError as e:
        if "forward-mode" not in str(e):
            raise
        if kernel != "plain":
            raise PlanError(
                "forward-mode differentiation (jvp) of products whose derivatives are written for reverse mode.\n"
                f"  {way_out} leaves them to autodiff, which has both, and is slower"
            ) from e
        raise PlanError(
            f"forward-mode differentiation (jvp) of a custom_vjp rule of the function itself: {way_out} has none.\n"
            "  give the function a custom_jvp rule; a model of lorax_kit: model.clone(plain=True)"
        ) from e


def adapt(
    fn: Callable[..., Any],
    plan: Plan,
    *,
    kernel: str = "auto",
    trials: int = 1,
    recompute: bool | str = True,
    costs: Costs | None = None,
    scale: Any = None,
    dropout: Any = None,
) -> Adapted:
    """Run any JAX function with low-rank parameters.

    Args:
      fn: `fn(params, *inputs, **kwargs)`, traceable by JAX; it is not changed.
      plan: from `lk.resolve`.
      kernel: "auto" (a cost model picks per site), "factored", "merged", or "plain" (autodiff throughout,
        for forward mode: jvp, jacfwd, and jit of them). The choice changes speed and rounding only.
      trials: how many stacked trials a surrounding `vmap` runs; steers "auto".
      recompute: the backward pass keeps the results of products and forms the norms, activations and layout changes
        between them again: about half the temporary memory, at the same speed and FLOPs to a few per cent. On meshes
        with explicit axes it keeps them all. "everything": it keeps what enters each attention and each feed-forward
        part, and forms all else again: a fraction of the memory, and about a forward pass more of time.
      costs: what "auto" weighs, from `Costs.read(FILE)` (`lorax-kit bench calibrate`); default: those measured for the
        kind of backend, or none in particular.
      scale: s of every site, in place of alpha / rank; it may be traced, so that one program serves many.
      dropout: rate of every site, in place of its own; likewise.

    Returns:
      `adapted(base, factors, *inputs, **kwargs)`, to be used under `jit`, `grad`, `vmap` like any function.
      With the keyword `dropout_key` the sites with dropout drop inputs of their low-rank path; without it
      the call is an evaluation. A site has one mask per call: where every step of a loop reads it, each drops the
      same places; where no input meets a parameter (a lookup, a sum or join of several), a warning says that none is
      dropped. Devices of a `shard_map` that hold other parts of the input draw other masks; in a `pmap` of your
      own, fold the key: `jax.random.fold_in(key, jax.lax.axis_index(name))`.

    Raises:
      PlanError: `kernel` is unknown, or `fn` has a keyword `dropout_key` of its own; when called, a base or a
        use that does not fit the plan.
      AdapterError: when called, factors that do not fit the plan.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from lorax_kit import LoRA, Spec, resolve, split
      >>> f = lambda p, x: x @ p["w"]
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((5, 4))
      >>> plan = resolve(Spec({"w": LoRA(rank=2)}), params, f, x)
      >>> base, factors = split(params, plan, jax.random.key(0))
      >>> bool((adapt(f, plan)(base, factors, x) == f(params, x)).all())
      True
    """
    if kernel != "auto" and kernel not in KERNELS:
        raise PlanError(f"kernel {kernel!r} is unknown; choose from auto, {', '.join(KERNELS)}.")
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise PlanError(f"trials is {trials!r}; it must be an integer of at least 1.")
    if recompute not in (True, False, "everything"):
        raise PlanError(f"recompute is {recompute!r}; it must be True, False or 'everything'.")
    if costs is not None and not isinstance(costs, Costs):
        raise PlanError(f"costs is a {type(costs).__name__}; read it from the file: Costs.read(FILE).")
    if "dropout_key" in _keywords(fn):
        raise PlanError(
            "the function has a keyword dropout_key, which adapted functions keep for the dropout of their sites.\n"
            "  wrap it: lambda params, *inputs, key: fn(params, *inputs, dropout_key=key)"
        )
    return Adapted(fn, plan, kernel, trials, recompute, costs, scale, dropout)


def _keywords(fn: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(fn).parameters)
    except (TypeError, ValueError):  # some callables do not tell
        return set()


def compressed(fn: Callable[..., Any], *, kernel: str = "factored") -> Callable[..., Any]:
    """Run any JAX function with params of which some are `LowRank` or `Quantised`.

    A product with a `LowRank` parameter runs as two, and nothing restores it. The result is a function like any other:
    `lk.resolve` and `lk.adapt` take it, and find the factors at `PATH/a` and `PATH/b`.

    Args:
      fn: `fn(params, *inputs, **kwargs)`, traceable by JAX; it is not changed.
      kernel: "factored", or "plain" (autodiff throughout, for forward mode).

    Returns:
      `run(params, *inputs, **kwargs)`, which raises a PlanError where it would have to restore a `LowRank` parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> from lorax_kit.core.lowrank import LowRank
      >>> w = LowRank(a=jnp.ones((1, 4)), b=jnp.ones((1, 3)), shape=(4, 3), dtype=jnp.float32)
      >>> compressed(lambda p, x: x @ p["w"])({"w": w}, jnp.ones((2, 4))).shape
      (2, 3)
    """

    def products(params: Params, *args: Any, **kwargs: Any) -> Any:
        named, treedef = flatten(params, whole=(LowRank,))
        weights = {path: lowrank_weight(path, leaf) for path, leaf in named.items() if isinstance(leaf, LowRank)}
        if not weights:
            return fn(params, *args, **kwargs)
        ctx = Context(kernel=kernel, restores=False)
        out = run(ctx, fn, named, treedef, weights, args, kwargs)
        for use in ctx.uses.values():
            if use.how == "materialised":
                raise PlanError(
                    f"{use.path!r} is low-rank, and the function needs it whole: {use.reason} ({use.primitive}).\n"
                    "  leave it dense when you compress"
                )
        return out

    def run_compressed(params: Params, *args: Any, **kwargs: Any) -> Any:
        with _forward_mode("compressed(fn, kernel='plain')", kernel):
            return run_whole(params, args, kwargs)

    def run_whole(params: Params, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named, treedef = flatten(params)
        # Factors and residuals may be quantised: to the products they are arrays like any other.
        weights = frozen_weights(named)
        if not weights:
            return products(params, *args, **kwargs)
        return run(Context(kernel=kernel), products, named, treedef, weights, args, kwargs)

    return run_compressed
