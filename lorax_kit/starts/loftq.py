"""LoftQ: a base in few bits, and factors that begin at what rounding took away (Li et al., arXiv 2310.08659, alg. 1).

    Q = q(W - s A^T B),   s A^T B = the best approximation of W - Q by rank r,   over and over

Symbols: q rounds to few bits, s is the scale; the paper has s = 1.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.core import quantize, split
from lorax_kit.core.paths import Params, flatten, unflatten
from lorax_kit.core.plan import Plan
from lorax_kit.core.site import Site
from lorax_kit.errors import PlanError
from lorax_kit.starts.matrices import by_matrix
from lorax_kit.starts.pissa import principal


def loftq(
    params: Params,
    plan: Plan,
    key: Array,
    *,
    method: str = "nf4",
    rounds: int = 1,
    block: int = 64,
    double: bool = True,
) -> tuple[Params, dict[str, Any]]:
    """Split params into a base whose adapted matrices are kept in few bits, and factors that make up for the rounding.

    In place of `lk.split` and `lk.quantize`. **The update is not zero at the start**: base and factors together are
    closer to W than the rounded base alone, `lk.merge` gives what they make, not `params`.

    Args:
      params: float, as the plan was resolved against.
      plan: from `lk.resolve`; sites of LoRA or DoRA, whose `start` must be a drawn one.
      key: a JAX random key, for leaves that are not the factors.
      method, block, double: as in `lk.quantize`; every site is quantised.
      rounds: of rounding and approximation; the best of them is kept.

    Returns:
      (base, factors): the base has `Quantised` leaves at the sites.

    Raises:
      PlanError: a site of another method, or with a start of its own; a parameter that is quantised already, rounds
        that are not a positive integer; what `lk.quantize` raises.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=8)}), params)
      >>> base, factors = loftq(params, plan, jax.random.key(1))
      >>> apart = lambda w: float(jnp.linalg.norm(w - params["w"]))
      >>> apart(lk.merge(base, factors, plan)["w"]) < 0.9 * apart(base["w"].restore())
      True
    """
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise PlanError(f"rounds is {rounds!r}; it must be an integer of at least 1.")
    _, factors = split(params, plan, key)
    named, treedef = flatten(params)
    for site in plan.sites:
        leaves = factors[site.path]
        if not hasattr(site.setting, "start") or leaves.a0 is not None:
            what = getattr(site.setting, "start", site.setting.kind)
            way_out = "a drawn start, such as 'kaiming'" if hasattr(site.setting, "start") else "lk.LoRA or lk.DoRA"
            raise PlanError(f"LoftQ gives the factors of {site.path!r}, and so does {what!r}.\n  give it {way_out}")
        w = named[site.path]
        if not isinstance(w, jax.Array | np.ndarray) or isinstance(w, jax.core.Tracer):
            raise PlanError(f"{site.path!r} is a {type(w).__name__}; LoftQ starts from the values before rounding.")
        to_bits = partial(_rounded, method=method, block=block, double=double)
        named[site.path], a, b = _alternated(site, jnp.asarray(w), to_bits, rounds)
        factors[site.path] = leaves._replace(a=a.astype(leaves.a.dtype), b=b.astype(leaves.b.dtype))
    return unflatten(named, treedef), factors


def _rounded(w: Array, dtype: Any, **how: Any) -> Any:
    return replace(quantize({"w": w}, ["w"], **how)["w"], dtype=dtype)


def _alternated(site: Site, w: Array, to_bits: Any, rounds: int) -> tuple[Any, Any, Any]:
    """(quantised, a, b) of the round that comes closest to W."""
    exact, low, best = np.asarray(w).astype(np.float64), 0.0, None
    for _ in range(rounds):
        quantised = to_bits(jnp.asarray(exact - low, jnp.float32), w.dtype)
        rest = exact - np.asarray(quantised.restore()).astype(np.float64)
        a, b = by_matrix(partial(principal, site=site), site, site.matrices(rest))
        low = site.from_matrices(_product(site, a, b))
        error = float(np.sum((rest - low) ** 2))
        if best is None or error < best[0]:
            best = error, quantised, a, b
    assert best is not None
    return best[1:]


def _product(site: Site, a: Any, b: Any) -> np.ndarray:
    """s a^T b as (S, K, N)."""
    shape = (site.rank, prod(site.stack_shape), -1)
    down, up = (np.asarray(x, np.float64).reshape(shape) for x in (a, b))
    return site.scale * np.einsum("rsk,rsn->skn", down, up)
