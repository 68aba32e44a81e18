"""EVA: `a` begins at the directions that the inputs vary along (Paischer et al., arXiv 2410.07170, algorithm 1).

    X = U S V^T over all inputs x (rows of X),   A0 = V_r^T,   B0 = 0

Symbols: A0 is `a` (r, K) with orthonormal rows, B0 is `b`. V holds the eigenvectors of sum x x^T. The share of
direction i in the inputs is S_i^2 / sum S^2; `eva_ranks` gives ranks to the sites whose directions have the largest.
(PEFT takes the mean of the inputs away first; the paper does not.)
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
from jax import Array

from lorax_kit.core.method import Hints
from lorax_kit.core.plan import Plan
from lorax_kit.core.site import Site
from lorax_kit.errors import PlanError
from lorax_kit.starts.matrices import by_matrix, needed, signs
from lorax_kit.starts.ranks import spend_ranks
from lorax_kit.starts.start import Start


def eva(site: Site, w: Array, key: Array, hints: Hints) -> Start:
    """`a` = the top r right singular vectors of the inputs; `b` is zero."""
    gram = needed(site, hints, "gram", "eva")

    def directions(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.linalg.eigh(gram)[1].T[::-1][: site.rank]
        return signs(rows) * rows, np.zeros((site.rank, prod(site.out_shape)))

    return by_matrix(directions, site, gram)._replace(b=None)


def eva_ranks(plan: Plan, stats: Mapping[str, Hints], *, budget: int | None = None, rho: float = 2.0) -> Plan:
    """Give the ranks of a plan to the sites whose inputs have the directions of the largest shares (section 3 of EVA).

    Sites of other starts or methods stay as they are. So does the scale of every site: alpha changes with the rank.

    Args:
      plan: from `lk.resolve`, with sites of `start="eva"`.
      stats: from `lk.calibrate`.
      budget: sum of the ranks over all matrices, a stack of S matrices counting S times; None: what the plan spends.
      rho: no site gets more than `rho` times its own rank, or than it can hold.

    Returns:
      A plan whose spec has one rule per path. A site that gets no rank is not in it.

    Raises:
      PlanError: no site of start "eva", statistics that lack one, a budget or rho out of range.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_kit as lk
      >>> params, fn = {"u": jnp.eye(4), "v": jnp.eye(4)}, lambda p, x: (x @ p["u"], jnp.sin(9 * x) @ p["v"])
      >>> x = jnp.linspace(0, 1, 20)[:, None] * jnp.ones((20, 4)) + 0.01 * jax.random.normal(jax.random.key(0), (20, 4))
      >>> plan = lk.resolve(lk.Spec({"*": lk.LoRA(rank=2, start="eva")}), params, fn, x)
      >>> stats = lk.calibrate(fn, params, plan, [x], progress=False)
      >>> {site.path: site.rank for site in lk.starts.eva_ranks(plan, stats, budget=3).sites}
      {'u': 1, 'v': 2}
    """
    chosen = [site for site in plan.sites if getattr(site.setting, "start", None) == "eva"]
    if not chosen:
        raise PlanError("no site of the plan has start='eva', whose ranks could be given out.")
    return spend_ranks(plan, {site.path: explained(site, stats) for site in chosen}, budget=budget, rho=rho)


def explained(site: Site, stats: Mapping[str, Hints]) -> np.ndarray:
    """(K,): the share of each direction in the squared size of the inputs, falling; the mean over stacked matrices."""
    gram = np.asarray(needed(site, stats.get(site.path, Hints()), "gram", "eva"), np.float64)
    values = np.maximum(np.linalg.eigvalsh(gram)[:, ::-1], 0.0)
    return np.mean(values / np.maximum(values.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny), axis=0)
