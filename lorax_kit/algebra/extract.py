"""An adapter from two checkpoints: the singular value decomposition of what tuning changed.

W_tuned - W_base = U S V^T ~ sum of the r leading triples
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kit.algebra.adaptation import Adaptation, check_rank, check_share, plain
from lorax_kit.algebra.rank import cut_whole
from lorax_kit.arrays.dtypes import wide
from lorax_kit.arrays.finite import all_finite
from lorax_kit.core.lowrank import dense
from lorax_kit.core.merge import check_params
from lorax_kit.core.paths import Params, flatten, is_array
from lorax_kit.core.plan import Plan
from lorax_kit.core.quantised import Quantised
from lorax_kit.core.site import FullSite
from lorax_kit.core.specs.spec import Spec
from lorax_kit.errors import AdapterError
from lorax_kit.transform import resolve


def extract(
    base: Params,
    tuned: Params,
    plan: Plan | Spec,
    *,
    rank: int | None = None,
    energy: float | None = None,
    keep: bool = False,
) -> Adaptation:
    """The adapter that turns one checkpoint into another, as closely as its rank allows.

    Args:
      base: the params before tuning.
      tuned: the same tree after it; dtypes may differ.
      plan: which parameters become low-rank, and along which axes; what it trains in full takes the tuned values.
        Of a spec every target must be an (in, out) matrix; `lk.resolve` with the function knows the others.
      rank: the highest rank of a site; without it and `energy`, those of the plan.
      energy: the share of |difference|_F^2 that each stacked matrix keeps, in (0, 1]; the rank is the least that does.
      keep: train in full, too, what differs and is not in the plan.

    Returns:
      A plain LoRA, whatever the plan's methods. Its `errors` say how far each site is from the difference; what differs
      and was left out has an error of 1.

    Raises:
      AdapterError: trees or shapes that differ, values that are not finite, a rank above min(in, out), no rank at all.
      PlanError: a base that does not fit the plan.

    Example:
      >>> import lorax_kit as lk
      >>> base = {"w": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> tuned = {"w": base["w"] + jnp.arange(4.0)[:, None], "bias": jnp.ones(3)}
      >>> found = extract(base, tuned, lk.Spec({"w": lk.LoRA(rank=1)}))
      >>> round(found.errors["w"], 6), found.errors["bias"]
      (0.0, 1.0)
    """
    named, others = flatten(base)[0], flatten(tuned)[0]
    _check_alike(named, others)
    plan = resolve(plan, base) if isinstance(plan, Spec) else plan
    if not isinstance(plan, Plan):
        raise AdapterError(f"the plan is a {type(plan).__name__}; it comes from lk.resolve, or is a spec.")
    check_params(named, plan)
    check_rank(rank, plan.sites)
    energy = None if energy is None else check_share("energy", energy)
    rows, errors = {}, {}
    for site in plan.sites:
        most = site.rank if rank is None and energy is None else rank
        if most == 0:
            raise AdapterError(f"the plan has no rank at {site.path!r} ({site.setting.kind}).\n  give rank= or energy=")
        w, other = (site.matrices(dense(x[site.path])) for x in (named, others))
        change = np.asarray(other).astype(np.float64) - np.asarray(w).astype(np.float64)
        rows[site.path], errors[site.path] = cut_whole(site, change, most, energy, wide(w.dtype, other.dtype))
    differ = [p for p in named if p not in plan.trained and _differ(p, named[p], others[p])]
    kept = [p for p in differ if keep and jnp.issubdtype(named[p].dtype, jnp.floating) and not _compact(named[p])]
    wholes = {leaf.path: leaf for leaf in plan.full}
    for path in kept:
        wholes[path] = FullSite(path=path, shape=named[path].shape, dtype=str(wide(named[path].dtype)))
    ordered = tuple(wholes[path] for path in named if path in wholes)
    full = {x.path: jnp.asarray(dense(others[x.path]), x.dtype) for x in ordered}
    errors |= dict.fromkeys([p for p in differ if p not in kept], 1.0)
    return plain([replace(plan, full=ordered)], rows, full, errors)


def _compact(x: Any) -> bool:
    return isinstance(x, Quantised)


def _check_alike(named: dict[str, Any], others: dict[str, Any]) -> None:
    """Raise `AdapterError` unless both hold the same finite parameters."""
    if set(named) != set(others):
        path = min({*named} ^ {*others})
        have, lack = ("base", "tuned params") if path in named else ("tuned params", "base")
        raise AdapterError(f"{path!r} is in the {have} and not in the {lack}: they are not of one model.")
    for path, x in named.items():
        other = others[path]
        if is_array(x) != is_array(other) or (is_array(x) and tuple(x.shape) != tuple(other.shape)):
            shapes = [getattr(y, "shape", type(y).__name__) for y in (x, other)]
            raise AdapterError(f"{path!r} is {shapes[0]} in the base and {shapes[1]} in the tuned params.")
        for who, y in (("base", x), ("tuned params", other)):
            if isinstance(y, jax.core.Tracer):
                raise AdapterError("the params are being traced: extract works on values, outside of jit and grad.")
            if is_array(y) and jnp.issubdtype(y.dtype, jnp.floating) and not all_finite(dense(y)):
                raise AdapterError(f"{path!r} of the {who} holds values that are not finite.")


def _differ(path: str, x: Any, other: Any) -> bool:
    """Whether two leaves hold different values."""
    if not is_array(x):
        return False
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x, other = jax.random.key_data(x), jax.random.key_data(other)
    return not np.array_equal(np.asarray(dense(x)), np.asarray(dense(other)))
